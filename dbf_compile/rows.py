"""Tables of quantized rows: their layout, and the only code that writes and reads it.

    W[n, k] ≈ scale[n, k // group] · code[n, k]             codes of 8, 6 or 4 bits, symmetric around zero

A table [N, K] is one tensor of int32 words [N, words of a row]. A row holds its scales, then its codes:

    int8    one float32 scale a row              a word: 4 columns, byte j of column j
    int4    bfloat16 scales, two a word          a word: 8 columns, low nibble of byte j of column j, high of column 4 + j
    int6    bfloat16 scales, two a word          3 words: 16 columns; two words as of int4, then a word of upper bits:
                                                 bits 2s, 2s + 1 of byte j of column 4s + j

Codes are stored without a sign, plus 2^(bits - 1). As scales are bits of words, no cast of a model changes a table. Words of 16
rows are interleaved as those of signs are (:mod:`dbf_compile.signs`): kernels read a block from front to back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dbf_compile.signs import BLOCK_ROWS, deinterleave, interleave

_CHUNK = 1 << 24  # weights that are computed with at a time
_BYTE = 8
# Of the scale that lets the largest weight of a group have the largest code: what a search tries.
_FACTORS = (1.0, 1.06, 1.12, 1.18, 1.24, 1.3, 0.94)


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a table are stored.

    Args:
        bits: of a code: 8, 6 or 4.
        group: columns of one scale; 0 for the whole row.
    """

    bits: int
    group: int

    @property
    def unit_columns(self) -> int:
        """Columns whose codes fill whole words."""
        return {8: 4, 6: 16, 4: 8}[self.bits]

    def groups(self, columns: int) -> int:
        """Return the number of scales of a row."""
        return -(-columns // self.group) if self.group else 1

    def scale_words(self, columns: int) -> int:
        """Return the number of words that hold the scales of a row."""
        return -(-self.groups(columns) // 2) if self.group else 1

    def words(self, columns: int) -> int:
        """Return the number of words of a row."""
        return (
            self.scale_words(columns) + -(-columns // self.unit_columns) * self.unit_columns * self.bits // 32
        )


ROW_FORMATS = {"int8": RowFormat(8, 0), "int6": RowFormat(6, 64), "int4": RowFormat(4, 32)}


def quantize_rows(weight: Tensor, form: RowFormat) -> Tensor:
    """Return a matrix [N, K] as a table: int32 words [N, ``form.words(K)``], interleaved, on the same device.

    A scale lets the largest weight of its group have the largest code; with fewer than 8 bits it is the one of several with the
    least squared error.

    Args:
        weight: floating point, finite.
        form: of the table.
    """
    columns = weight.shape[1]
    table = torch.empty(len(weight), form.words(columns), dtype=torch.int32, device=weight.device)
    for rows in _chunks(len(weight), columns):
        table[rows] = _quantized(weight[rows].detach().float(), form)
    return interleave(table)


def dequantize_rows(
    table: Tensor, columns: int, form: RowFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the matrix [N, K] that a table stands for.

    Args:
        table: int32 words, interleaved.
        columns: K.
        form: of the table.
        dtype: of the result; computed in float32.
    """
    return unpack_rows(deinterleave(table), columns, form, dtype)


def read_rows(
    table: Tensor, ids: Tensor, columns: int, form: RowFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return rows of a table: [...] to [..., K].

    Args:
        table: int32 words [N, words], interleaved.
        ids: whole numbers [...] from 0 to N - 1.
        columns: K.
        form: of the table.
        dtype: of the result.

    Raises:
        IndexError: an id is not one of a row.
    """
    rows, words = table.shape
    full = rows - rows % BLOCK_ROWS
    ids = ids.long()
    first = ids // BLOCK_ROWS * (BLOCK_ROWS * words) + ids % BLOCK_ROWS
    count = torch.arange(words, device=table.device)
    places = first.unsqueeze(-1) + BLOCK_ROWS * count
    if full < rows:  # the last rows are stored one by one
        places = torch.where((ids < full).unsqueeze(-1), places, ids.unsqueeze(-1) * words + count)
    # An index below zero would count from the end.
    places = torch.where((ids < 0).unsqueeze(-1), rows * words, places)
    return unpack_rows(table.reshape(-1)[places], columns, form, dtype)


def scales_of(table: Tensor, columns: int, form: RowFormat) -> Tensor:
    """Return the scales [N, groups] of a table of interleaved words, as float32."""
    return _scales(deinterleave(table)[:, : form.scale_words(columns)], columns, form)


def unpack_rows(words: Tensor, columns: int, form: RowFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows [..., K] for their words [..., words], not interleaved."""
    first = form.scale_words(columns)
    scales, codes = words[..., :first], words[..., first:]
    scale = _scales(scales, columns, form)
    if form.group:
        scale = scale.repeat_interleave(form.group, -1)[..., :columns]
    return (_signed(codes, form.bits)[..., :columns].float() * scale).to(dtype)


def _scales(words: Tensor, columns: int, form: RowFormat) -> Tensor:
    """Return scales [..., groups] for the words that hold them, not interleaved."""
    if not form.group:
        scales = words
    else:
        scales = torch.stack([words << 16, words & -(1 << 16)], -1).flatten(-2)[..., : form.groups(columns)]
    result: Tensor = scales.contiguous().view(torch.float32)
    return result


def _signed(words: Tensor, bits: int) -> Tensor:
    """Return the codes of whole units of words: [..., words] to [..., columns]."""
    bytes_of = torch.arange(0, 32, _BYTE, dtype=torch.int32, device=words.device)
    if bits == 8:
        return ((words.unsqueeze(-1) >> bytes_of) & 0xFF).flatten(-2) - 128
    half = torch.tensor([0, 4], dtype=torch.int32, device=words.device).unsqueeze(-1)
    if bits == 4:
        return ((words[..., None, None] >> (half + bytes_of)) & 0xF).flatten(-3) - 8
    units = words.unflatten(-1, (-1, 3))
    low = (units[..., :2, None, None] >> (half + bytes_of)) & 0xF  # [..., units, word, half, byte]
    step = torch.arange(0, 8, 2, dtype=torch.int32, device=words.device).view(2, 2, 1)
    high = (units[..., 2:, None, None] >> (step + bytes_of)) & 3
    codes: Tensor = (low + 16 * high).flatten(-4) - 32
    return codes


def _quantized(weight: Tensor, form: RowFormat) -> Tensor:
    """Return the words of rows, not interleaved."""
    columns, most = weight.shape[1], 1 << (form.bits - 1)
    if not form.group:
        scale = weight.abs().amax(1, keepdim=True) / (most - 1)
        codes = _rounded(weight, scale, most)
        return torch.cat([scale.view(torch.int32), _packed(codes, form)], 1)
    groups = form.groups(columns)
    padded = torch.nn.functional.pad(weight, (0, groups * form.group - columns))
    grouped = padded.view(-1, groups, form.group)
    scale = _best_scales(grouped, most)
    codes = _rounded(grouped, scale, most).flatten(1)[:, :columns]
    halves = torch.nn.functional.pad(scale.squeeze(-1), (0, groups % 2)).view(torch.int32) >> 16
    pairs = halves.view(len(weight), -1, 2)
    return torch.cat([(pairs[..., 0] & 0xFFFF) | (pairs[..., 1] << 16), _packed(codes, form)], 1)


def _rounded(weight: Tensor, scale: Tensor, most: int) -> Tensor:
    """Return codes from -most to most - 1; of a scale of zero they are zero."""
    return (weight / torch.where(scale == 0, 1, scale)).round().clamp(-most, most - 1)


def _best_scales(groups: Tensor, most: int) -> Tensor:
    """Return, as float32 with the precision of bfloat16, the scales [..., 1] of groups [..., columns] with the least error.

    There is one more code below zero than above it. So the sign of a scale is that with which the largest weight is below.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    unit = torch.where(largest == 0, 1, largest)  # squares of very large weights would overflow
    groups = groups / unit
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for factor in _FACTORS:
        codes = _rounded(groups, torch.full_like(unit, -factor / most), most)
        size = codes.square().sum(-1, keepdim=True)
        fitted = (codes * groups).sum(-1, keepdim=True) / size.clamp_min(1)  # of least squares
        fitted = (fitted * unit).bfloat16().float() / unit
        error = (groups - fitted * _rounded(groups, fitted, most)).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, fitted, best), torch.minimum(error, least)
    return (best * unit).bfloat16().float()


def _packed(codes: Tensor, form: RowFormat) -> Tensor:
    """Return codes [N, K] as words."""
    columns = codes.shape[1]
    unit = form.unit_columns
    padded = torch.nn.functional.pad(codes, (0, -columns % unit)).int() + (1 << (form.bits - 1))
    if columns % unit:
        padded[:, columns:] = 1 << (form.bits - 1)
    bytes_of = torch.arange(0, 32, _BYTE, dtype=torch.int32, device=codes.device)
    if form.bits == 8:
        return (padded.view(len(codes), -1, 4) << bytes_of).sum(-1, dtype=torch.int32)
    half = torch.tensor([0, 4], dtype=torch.int32, device=codes.device).unsqueeze(-1)
    if form.bits == 4:
        return (padded.view(len(codes), -1, 2, 4) << (half + bytes_of)).sum((-2, -1), dtype=torch.int32)
    units = padded.view(len(codes), -1, 2, 2, 4)
    low = ((units & 0xF) << (half + bytes_of)).sum((-2, -1), dtype=torch.int32)
    step = torch.arange(0, 8, 2, dtype=torch.int32, device=codes.device).view(2, 2, 1)
    high = ((units >> 4) << (step + bytes_of)).sum((-3, -2, -1), dtype=torch.int32)
    return torch.cat([low, high.unsqueeze(-1)], -1).flatten(1)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(BLOCK_ROWS, _CHUNK // max(1, columns) // BLOCK_ROWS * BLOCK_ROWS)
    return (slice(first, first + step) for first in range(0, rows, step))
