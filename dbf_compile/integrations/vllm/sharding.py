"""What one rank of several holds of a factored layer: pure functions of sizes and tensors.

    layer        split                                                          whole
    column       rows of signs_out, scale_out and of a dense weight             first stage
    row          columns of signs_in, scale_in and of a dense weight            scale_mid, second stage
    replicated   nothing                                                        all

The second stage of a row-parallel layer is applied to partial sums: it is linear, so the sum over ranks comes after it, where a
dense layer has it. Signs come interleaved, as folders have them, and leave row by row.

Shape letters: K in_features, R mid_features, N out_features, W words of a row, of all ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.factors import factor_shapes
from dbf_compile.linear import WEIGHT_PLACEHOLDER
from dbf_compile.signs import WORD_BITS, deinterleave, interleave, slice_columns, words_per_row

_DAMAGED = "copy the folder again, or compress the model again"


class Shard(NamedTuple):
    """What a rank holds of the rows and columns of a weight [N, K].

    Args:
        rows: N, of all ranks together.
        columns: K, of all ranks together.
        own_rows: the rank's rows, several ranges where several projections are one weight.
        own_columns: the rank's columns.
        padded_rows: number of the rank's rows, those counted that are filled with zeros behind the last one.
    """

    rows: int
    columns: int
    own_rows: Sequence[slice]
    own_columns: slice
    padded_rows: int


def own_range(whole: int, own: int, rank: int, ranks: int) -> slice:
    """Return which part of a dimension a rank holds.

    Several ranks hold the same one where there are fewer parts than ranks, as of the keys of grouped-query attention.

    Args:
        whole: size of the dimension.
        own: size of the part that a rank holds.
        rank: from 0.
        ranks: number of ranks.

    Raises:
        ConversionError: the parts do not make up the whole.
    """
    if whole % own or ranks % (whole // own):
        raise ConversionError(
            f"{own} of {whole} rows or columns on each of {ranks} ranks",
            "parts that make up the whole, each on the same number of ranks",
            "choose another tensor_parallel_size",
        )
    first = rank * (whole // own) // ranks * own
    return slice(first, first + own)


def middle_range(mid_features: int, rank: int, ranks: int) -> tuple[slice, int]:
    """Return which part of R a rank holds where it is split, and how many that are with padding: whole words, as many on each."""
    count = words_per_row(-(-mid_features // ranks)) * WORD_BITS
    return slice(min(rank * count, mid_features), min((rank + 1) * count, mid_features)), count


def own_ranges(wholes: Sequence[int], owns: Sequence[int], rank: int, ranks: int) -> list[slice]:
    """Return which rows of stacked projections a rank holds, one range for each."""
    ranges, start = [], 0
    for whole, own in zip(wholes, owns, strict=True):
        part = own_range(whole, own, rank, ranks)
        ranges.append(slice(start + part.start, start + part.stop))
        start += whole
    return ranges


def sign_bits(shard: Shard, mid_features: int, has_first_stage: bool) -> tuple[int, int]:
    """Return how many signs of a layer a rank holds, and how many there are.

    Args:
        shard: what the rank holds.
        mid_features: R.
        has_first_stage: whether the layer has one of its own.
    """
    own_columns = shard.own_columns.stop - shard.own_columns.start
    own_rows = sum(one.stop - one.start for one in shard.own_rows)
    return (
        mid_features * (own_columns * has_first_stage + own_rows),
        mid_features * (shard.columns * has_first_stage + shard.rows),
    )


def cut(name: str, tensor: Tensor, shard: Shard) -> Tensor:
    """Return a rank's part of a tensor of a layer, contiguous.

    Args:
        name: of one of the five tensors, or "weight" of a dense layer.
        tensor: as a folder has it.
        shard: what the rank holds.
    """
    if name == "scale_mid":
        return tensor.contiguous()
    if name == "scale_in":
        return tensor[shard.own_columns].contiguous()
    if name == "signs_in":
        words = deinterleave(tensor)
        whole = shard.own_columns == slice(0, shard.columns)
        return words if whole else slice_columns(words, shard.own_columns.start, shard.own_columns.stop)
    if name == "signs_out":
        tensor = deinterleave(tensor)
    if name == WEIGHT_PLACEHOLDER:
        tensor = tensor[:, shard.own_columns]
    return take_rows(tensor, shard.own_rows, shard.padded_rows)


def take_rows(tensor: Tensor, ranges: Sequence[slice], count: int) -> Tensor:
    """Return rows of a tensor one range behind the other, filled up with zeros to ``count`` rows, contiguous."""
    parts = [tensor[one] for one in ranges]
    missing = count - sum(map(len, parts))
    if missing:
        parts.append(tensor.new_zeros(missing, *tensor.shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def take_interleaved_rows(tensor: Tensor, ranges: Sequence[slice], count: int) -> Tensor:
    """Return rows of interleaved words, filled up with zeros to ``count`` rows, interleaved."""
    if list(ranges) == [slice(0, len(tensor))] and count == len(tensor):
        return tensor.contiguous()
    return interleave(take_rows(deinterleave(tensor), ranges, count))


def check_tensor(layer: str, name: str, tensor: Tensor, sizes: tuple[int, int, int]) -> None:
    """Compare the shape of a tensor of a folder with the sizes K, R, N of its layer; R is 0 of a dense layer.

    Raises:
        CheckpointError: they differ.
    """
    in_features, mid_features, out_features = sizes
    if name == WEIGHT_PLACEHOLDER:
        if mid_features and not tensor.numel():
            return  # empty beside factors, and on its side where vLLM turns the weights of GPT-2
        expected: tuple[int, ...] = (out_features, 0 if mid_features else in_features)
    else:
        expected = factor_shapes(in_features, mid_features, out_features)[name]
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"layer {layer!r}: {name} of shape {tuple(tensor.shape)}", f"shape {expected}", _DAMAGED
        )


def check_complete(layer: str, loaded: Mapping[str, Tensor], expected: Sequence[str]) -> None:
    """Check that all tensors of a layer were loaded.

    Raises:
        CheckpointError: some are missing.
    """
    absent = [name for name in expected if name not in loaded]
    if absent:
        raise CheckpointError(f"layer {layer!r} without {', '.join(absent)}", ", ".join(expected), _DAMAGED)
