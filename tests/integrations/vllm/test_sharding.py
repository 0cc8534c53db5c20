"""What a rank holds of a layer: parts fit together to the whole, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import random_factors, seeds
from torch import Tensor

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.factors import SIGN_NAMES, DoubleBinaryFactors, mid_features_for
from dbf_compile.integrations.vllm.sharding import (
    Shard,
    check_complete,
    check_tensor,
    cut,
    own_range,
    own_ranges,
    sign_bits,
    take_interleaved_rows,
    take_rows,
)
from dbf_compile.signs import deinterleave, interleave

ranks_of = st.sampled_from((1, 2, 3, 4, 8))
sizes = st.integers(1, 70)


def folder_tensors(factors: DoubleBinaryFactors) -> dict[str, Tensor]:
    """Return the tensors as a folder has them."""
    return {
        name: interleave(tensor) if name in SIGN_NAMES else tensor
        for name, tensor in factors.tensors().items()
    }


def dense_part(factors: DoubleBinaryFactors, shard: Shard) -> Tensor:
    """Return the weight that a rank's tensors stand for."""
    own = {name: cut(name, tensor, shard) for name, tensor in folder_tensors(factors).items()}
    assert all(tensor.is_contiguous() for tensor in own.values())
    return DoubleBinaryFactors(**own).dense(torch.float64)


@given(ranks_of, sizes, sizes, sizes, seeds)
def test_rows_of_all_ranks_are_the_rows_of_the_layer(
    ranks: int, columns: int, middle: int, own: int, seed: int
) -> None:
    factors = random_factors(columns, middle, own * ranks, seed)
    shards = [
        Shard(own * ranks, columns, [own_range(own * ranks, own, rank, ranks)], slice(0, columns), own)
        for rank in range(ranks)
    ]
    parts = [dense_part(factors, shard) for shard in shards]
    torch.testing.assert_close(torch.cat(parts), factors.dense(torch.float64), rtol=1e-12, atol=1e-12)


@given(ranks_of, sizes, sizes, sizes, seeds)
def test_columns_of_all_ranks_are_the_columns_of_the_layer(
    ranks: int, own: int, middle: int, rows: int, seed: int
) -> None:
    factors = random_factors(own * ranks, middle, rows, seed)
    shards = [
        Shard(rows, own * ranks, [slice(0, rows)], own_range(own * ranks, own, rank, ranks), rows)
        for rank in range(ranks)
    ]
    parts = [dense_part(factors, shard) for shard in shards]
    torch.testing.assert_close(torch.cat(parts, 1), factors.dense(torch.float64), rtol=1e-12, atol=1e-12)


@given(st.lists(st.tuples(st.sampled_from((1, 2, 4)), st.integers(1, 20)), min_size=1, max_size=4), seeds)
def test_projections_that_are_one_weight_are_cut_each(parts: list[tuple[int, int]], seed: int) -> None:
    """Of a part with fewer heads than ranks several ranks hold the same."""
    ranks = 4
    wholes, owns = [count * own for count, own in parts], [own for _, own in parts]
    weight = torch.randn(sum(wholes), 5, generator=torch.Generator().manual_seed(seed))
    for rank in range(ranks):
        ranges = own_ranges(wholes, owns, rank, ranks)
        shard = Shard(sum(wholes), 5, ranges, slice(0, 5), sum(owns))
        expected = [
            piece.chunk(count)[rank * count // ranks]
            for piece, (count, _) in zip(weight.split(wholes), parts, strict=True)
        ]
        assert torch.equal(cut("weight", weight, shard), torch.cat(expected))


@given(sizes, sizes, st.integers(0, 40), st.data())
def test_rows_behind_the_last_one_are_zero(rows: int, words: int, padding: int, data: st.DataObject) -> None:
    last = data.draw(st.integers(1, rows))
    first = data.draw(st.integers(0, last - 1))
    table = torch.arange(1, rows * words + 1, dtype=torch.int32).view(rows, words)
    count = last - first + padding
    own = deinterleave(take_interleaved_rows(interleave(table), [slice(first, last)], count))
    assert torch.equal(own, take_rows(table, [slice(first, last)], count))
    assert torch.equal(own[: last - first], table[first:last])
    assert own.shape == (count, words) and not own[last - first :].any()


def test_keys_that_ranks_share_are_those_of_their_queries() -> None:
    assert [own_range(128, 64, rank, 4).start for rank in range(4)] == [0, 0, 64, 64]
    assert [own_range(64, 64, rank, 4).start for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 0.61), (4, 0.41), (8, 0.31)])
def test_share_of_a_rank_of_llama_8b(ranks: int, share: float) -> None:
    """With 2 bits: both halves of a column- and a row-parallel layer would be 1 / ranks, their other stage is whole."""
    own = whole = 0
    merged = [(4096, [4096, 1024, 1024]), (4096, [14336, 14336])]
    for columns, rows in merged:
        middle = mid_features_for(2.0, columns, sum(rows))
        for index, count in enumerate(rows):
            shard = Shard(count, columns, [own_range(count, count // ranks, 0, ranks)], slice(0, columns), 0)
            bits = sign_bits(shard, middle, index == 0)
            own, whole = own + bits[0], whole + bits[1]
    for columns in (4096, 14336):
        shard = Shard(4096, columns, [slice(0, 4096)], own_range(columns, columns // ranks, 0, ranks), 4096)
        bits = sign_bits(shard, mid_features_for(2.0, columns, 4096), True)
        own, whole = own + bits[0], whole + bits[1]
    assert own / whole == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize(("whole", "own", "ranks"), [(10, 4, 2), (12, 4, 2), (12, 4, 4)])
def test_parts_that_do_not_make_up_the_whole_are_refused(whole: int, own: int, ranks: int) -> None:
    with pytest.raises(ConversionError, match="parts that make up the whole"):
        own_range(whole, own, 0, ranks)


def test_tensors_of_other_sizes_and_missing_ones_are_refused() -> None:
    tensors = folder_tensors(random_factors(40, 33, 20))
    for name, tensor in tensors.items():
        check_tensor("q", name, tensor, (40, 33, 20))
    check_tensor("q", "weight", torch.empty(20, 0), (40, 33, 20))
    check_tensor("q", "weight", torch.empty(20, 40), (40, 0, 20))
    with pytest.raises(CheckpointError, match="signs_in of shape"):
        check_tensor("q", "signs_in", tensors["signs_in"], (70, 33, 20))
    with pytest.raises(CheckpointError, match="weight of shape"):
        check_tensor("q", "weight", torch.empty(20, 40), (40, 33, 20))
    del tensors["scale_mid"]
    with pytest.raises(CheckpointError, match="'q' without scale_mid"):
        check_complete("q", tensors, ("signs_in", "scale_mid"))
