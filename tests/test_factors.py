"""DoubleBinaryFactors: the weight they stand for, their size, their parts, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import double_binary_factors, random_factors, sizes
from torch import Tensor

from dbf_compile.errors import FactorsError
from dbf_compile.factors import (
    FIRST_STAGE,
    TENSOR_NAMES,
    DoubleBinaryFactors,
    mid_features_for,
    move_factors,
    stored_bits,
)
from dbf_compile.signs import unpack_signs
from dbf_compile.testing import assert_close


@given(double_binary_factors())
def test_dense_is_the_formula(factors: DoubleBinaryFactors) -> None:
    signs_in = unpack_signs(factors.signs_in, factors.in_features, torch.float64)
    signs_out = unpack_signs(factors.signs_out, factors.mid_features, torch.float64)
    scale_in, scale_mid, scale_out = (
        getattr(factors, name).double() for name in ("scale_in", "scale_mid", "scale_out")
    )
    weight = torch.einsum("n,nr,r,rk,k->nk", scale_out, signs_out, scale_mid, signs_in, scale_in)
    assert factors.dense().dtype == torch.float32
    # float64: both sides round some ten times per term, in another order.
    assert_close(factors.dense(torch.float64), weight, rtol=1e-13)
    # float32: at most (R + 4) roundings of 2^-24 of Σ|terms| = |scale_out| · Σ|scale_mid| · |scale_in|.
    terms = scale_mid.abs().sum() * scale_out.abs()[:, None] * scale_in.abs()
    assert_close(factors.dense(), weight, bound=(factors.mid_features + 5) * 2.0**-24 * terms)


@given(double_binary_factors(dtypes=st.sampled_from((torch.float16, torch.bfloat16))))
def test_bits_count_every_stored_bit(factors: DoubleBinaryFactors) -> None:
    by_hand = 0
    for tensor in factors.tensors().values():
        by_hand += 8 * len(tensor.contiguous().view(torch.uint8).flatten())
    assert factors.bits() == by_hand
    assert factors.bits() == stored_bits(factors.in_features, factors.mid_features, factors.out_features)
    assert factors.bits_per_weight() == by_hand / factors.dense().numel()


def test_bits_by_example() -> None:
    # signs_in 5 x 2 words, signs_out 3 x 1 word, 33 + 5 + 3 scales of 16 bits.
    assert stored_bits(33, 5, 3) == 32 * (10 + 3) + 16 * 41
    # Wider scales cost what they take, whatever the estimate says.
    assert random_factors(33, 5, 3, dtype=torch.float32).bits() == 32 * (10 + 3) + 32 * 41


@given(st.floats(0, 20), sizes, sizes)
def test_mid_features_for_is_the_largest_that_fits(bits: float, in_features: int, out_features: int) -> None:
    budget = bits * in_features * out_features
    mid_features = mid_features_for(bits, in_features, out_features)
    assert mid_features >= 0
    assert mid_features == 0 or stored_bits(in_features, mid_features, out_features) <= budget
    assert stored_bits(in_features, mid_features + 1, out_features) > budget


def test_mid_features_by_example() -> None:
    assert mid_features_for(0.001, 64, 64) == 0
    assert mid_features_for(2.0, 4096, 4096) == 4064  # near 2 signs per weight, less the scales


@given(double_binary_factors(), st.data())
def test_split_is_a_cut_of_the_rows_that_shares_the_first_stage(
    factors: DoubleBinaryFactors, data: st.DataObject
) -> None:
    cuts = data.draw(st.sets(st.integers(1, factors.out_features), max_size=3)) | {factors.out_features}
    ends = sorted(cuts)
    rows = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = list(factors.split(rows))
    for name in ("signs_out", "scale_out"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(factors, name))
    for part, count in zip(parts, rows, strict=True):
        assert part.out_features == count
        assert all(getattr(part, n) is getattr(factors, n) for n in ("signs_in", "scale_in", "scale_mid"))
    # Not bit for bit: matrix products of other heights may sum in another order.
    stacked = torch.cat([part.dense(torch.float64) for part in parts])
    assert_close(stacked, factors.dense(torch.float64), rtol=1e-13)


@given(double_binary_factors(out_features=st.just(7)), st.sampled_from([(1, 6), (2, 3, 2), (7,)]))
def test_stack_undoes_split(factors: DoubleBinaryFactors, rows: tuple[int, ...]) -> None:
    again = DoubleBinaryFactors.stack(list(factors.split(rows)))
    assert all(
        torch.equal(a, b) for a, b in zip(again.tensors().values(), factors.tensors().values(), strict=True)
    )
    assert again.signs_in is factors.signs_in


def test_parts_of_two_factorizations_are_not_stacked() -> None:
    with pytest.raises(FactorsError, match="first stages of their own"):
        DoubleBinaryFactors.stack([random_factors(4, 4, 3), random_factors(4, 4, 3)])


@pytest.mark.parametrize("rows", [[1, 1], [4], [], [1, 1, 2]])
def test_parts_that_do_not_add_up_are_refused(rows: list[int]) -> None:
    with pytest.raises(FactorsError, match="groups that add up to 3"):
        list(random_factors(4, 4, 3).split(rows))


def test_to_changes_scales_only_and_copies_nothing_without_need() -> None:
    factors = random_factors(33, 5, 3)
    same = factors.to("cpu")
    assert all(getattr(same, name) is getattr(factors, name) for name in TENSOR_NAMES)
    wide = factors.to(scale_dtype=torch.float32)
    assert wide.signs_in is factors.signs_in and wide.scale_mid.dtype == torch.float32
    assert torch.equal(wide.dense(), factors.dense())
    assert factors.to("meta").scale_in.device.type == "meta"


def test_factors_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_factors(4, 4, 3).scale_in = torch.ones(4)  # type: ignore[misc]


def _poisoned(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scale_in", lambda t: t.to(torch.float64), "scale_in of dtype torch.float64"),
        ("scale_in", lambda t: t.to(torch.bfloat16), "one dtype and one device"),
        ("scale_mid", lambda t: t[None], r"scale_mid of dtype torch.float16 and shape \(1, 5\)"),
        ("scale_out", lambda t: t[:0], "a non-empty vector"),
        ("scale_out", lambda t: _poisoned(t, float("nan")), "scale_out with NaN or infinite"),
        ("scale_mid", lambda t: _poisoned(t, float("inf")), "scale_mid with NaN or infinite"),
        ("scale_mid", lambda t: t[:-1], "signs_in with 5 rows for a scale of 4"),
        ("scale_in", lambda t: t.to("meta"), r"on devices \['cpu', 'meta'\]"),
        ("signs_in", lambda t: t.long(), "signs_in: packed signs of dtype torch.int64"),
        ("signs_in", lambda t: t[:, :1], r"for 33 columns; allowed: int32 \[rows, 2\]"),
        ("signs_out", lambda t: t[:-1], "signs_out with 2 rows for a scale of 3"),
        ("signs_out", lambda t: t | 1 << 5, "signs_out with bits set behind column 5"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    tensors = random_factors(33, 5, 3).tensors()
    with pytest.raises(FactorsError, match=message):
        DoubleBinaryFactors(**{**tensors, name: change(tensors[name])})


def test_what_several_share_is_moved_once_and_stays_shared() -> None:
    whole = random_factors(70, 5, 9)
    parts = dict(zip("qkv", whole.split([3, 4, 2]), strict=True)) | {"o": random_factors(70, 5, 4, seed=1)}
    moved = move_factors(parts, dict.fromkeys(parts, torch.device("meta")))
    assert all(
        tensor.device.type == "meta" for factors in moved.values() for tensor in factors.tensors().values()
    )
    for name in FIRST_STAGE:
        assert len({id(getattr(moved[part], name)) for part in "qkv"}) == 1
        assert getattr(moved["o"], name) is not getattr(moved["q"], name)
    assert [factors.out_features for factors in moved.values()] == [3, 4, 2, 4]
    stay = move_factors(parts, dict.fromkeys(parts, torch.device("cpu")))
    assert all(stay[part].signs_in is parts[part].signs_in for part in parts)
