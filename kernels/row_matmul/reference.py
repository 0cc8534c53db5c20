"""The reference of ``dbf::row_matmul`` and its transpose in plain torch; the kernel is tested against it.

Shape letters: K columns and N rows of the table; x has any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dbf_compile.rows import RowFormat, unpack_rows
from dbf_compile.signs import BLOCK_ROWS, deinterleave

_CHUNK = 1 << 24  # weights that are written out at a time


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of ``dtype`` values: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def row_matmul(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    form: RowFormat,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply by a table: ``y[..., n] = Σ_k W[n, k] · x[..., k] + bias[n]``.

    Args:
        x: floating point [..., K].
        rows: int32 words [N, words], layout of :mod:`dbf_compile.rows`.
        bias: floating point [N], or None for zeros.
        form: of the table.
        dtype: of the result; None for the dtype of the sums: float32, or float64 for float64 ``x``.

    Returns:
        [..., N].
    """
    wide = accumulator_dtype(x.dtype)
    parts = [x.to(wide) @ part.T for part in _dense_parts(rows, x.shape[-1], form, wide)]
    y = torch.cat(parts, -1) if parts else x.new_zeros((*x.shape[:-1], 0), dtype=wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype or wide)


def row_matmul_transposed(grad: Tensor, rows: Tensor, columns: int, form: RowFormat) -> Tensor:
    """Multiply by the transpose: ``g_x[..., k] = Σ_n W[n, k] · g_y[..., n]``.

    Args:
        grad: floating point [..., N].
        rows: int32 words [N, words].
        columns: K.
        form: of the table.

    Returns:
        [..., K] in the dtype of the sums.
    """
    wide = accumulator_dtype(grad.dtype)
    total = grad.new_zeros((*grad.shape[:-1], columns), dtype=wide)
    first = 0
    for part in _dense_parts(rows, columns, form, wide):
        total = total + grad[..., first : first + len(part)].to(wide) @ part
        first += len(part)
    return total


def _dense_parts(rows: Tensor, columns: int, form: RowFormat, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the matrix [N, K] of a table, a few of its rows at a time."""
    step = max(BLOCK_ROWS, _CHUNK // columns // BLOCK_ROWS * BLOCK_ROWS)
    for first in range(0, len(rows), step):
        yield unpack_rows(deinterleave(rows[first : first + step]), columns, form, dtype)
