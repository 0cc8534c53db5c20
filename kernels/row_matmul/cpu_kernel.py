"""The C++ kernel of ``dbf::row_matmul``, built on first use; ``DBF_CPU_ISA`` chooses as for ``dbf::sign_matmul``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dbf_compile.kernels.cpp_build import Library
from dbf_compile.rows import RowFormat

library = Library(Path(__file__).with_suffix(".cpp"))
DTYPES = (torch.float32, torch.bfloat16)  # that the kernel writes
_MOST_COLUMNS = 1 << 16


def takes(columns: int) -> bool:
    """Return whether sums of rows of so many columns fit the kernel, and it can be built here."""
    return 0 < columns <= _MOST_COLUMNS and library.available()


def row_matmul_cpu(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    form: RowFormat,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply by a table: ``y[..., n] = Σ_k W[n, k] · x[..., k] + bias[n]``.

    Args:
        x: floating point [..., K]; computed with in float32.
        rows: int32 words [N, words], layout of :mod:`dbf_compile.rows`.
        bias: floating point [N], or None.
        form: of the table.
        dtype: of the result.

    Returns:
        [..., N]; bit-identical for any number of threads, any batch around a token, and any instruction set.
    """
    out = x.new_empty((*x.shape[:-1], rows.shape[0]), dtype=dtype if dtype in DTYPES else torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    torch.ops.dbf_native.row_matmul.out(
        x.float().contiguous(), rows.contiguous(), bias, bits=form.bits, group=form.group, out=out
    )
    return out.to(dtype)
