"""The C++ steps of an update, built on first use; the functions are those of :mod:`.reference`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dbf_compile.kernels.cpp_build import Library

library = Library(Path(__file__).with_suffix(".cpp"))
_FEW = 2**16  # elements of a factor, below which plain torch is fast enough to build nothing


def takes(point: Tensor) -> bool:
    """Return whether the kernel takes a factor, and can be built here."""
    return point.device.type == "cpu" and point[0].numel() >= _FEW and library.available()


def anchor(point: Tensor, rows: Tensor, columns: Tensor, leak: float, out: Tensor) -> Tensor:
    """Write ``(primal − leak · dual)ᵀ`` [B, Q, M] to ``out``, float32 or bfloat16, and return it."""
    torch.ops.dbf_native.factor_anchor.out(point, rows, columns, leak, out=out)
    return out


def rest(target: Tensor, product: Tensor, share: Tensor) -> Tensor:
    """Make ``target − share · product`` [B, Q, P] of ``product``, float32 or bfloat16, and return it."""
    torch.ops.dbf_native.factor_rest(target, share, product)
    return product


def advance(
    point: Tensor,
    rows: Tensor,
    columns: Tensor,
    step: Tensor,
    share: Tensor,
    relaxation: float,
    leak: float,
    keep_columns: bool,
) -> None:
    """Move a factor, in place, and fit its magnitude; bit-identical for any number of threads and any instruction set."""
    torch.ops.dbf_native.factor_advance(point, rows, columns, step, share, relaxation, leak, keep_columns)


def average(point: Tensor, rows: Tensor, columns: Tensor, averaging: float, basis: Tensor) -> None:
    """Average a basis with the factor's primal, its rows scaled to norm 1; in place."""
    torch.ops.dbf_native.factor_average(point, rows, columns, averaging, basis)
