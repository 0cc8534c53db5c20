"""The reference of ``dbf::sign_matmul`` and its transpose in plain torch; every kernel is tested against it.

Shape letters: K columns and N rows of the sign matrix, W = ceil(K / 32) words; x has any number of leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dbf_compile.signs import deinterleave, unpack_signs


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of ``dtype`` values: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def sign_matmul(
    x: Tensor,
    signs: Tensor,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Multiply by a sign matrix: ``y[..., n] = out_scale[n] · Σ_k signs[n, k] · in_scale[k] · x[..., k] + bias[n]``.

    Args:
        x: floating point [..., K].
        signs: int32 words [N, W], layout of :mod:`dbf_compile.signs`.
        in_scale: floating point [K], or None for ones.
        out_scale: floating point [N], or None for ones.
        bias: floating point [N], or None for zeros.
        dtype: of the result; None for the dtype of the sums: float32, or float64 for float64 ``x``.
        interleaved: whether the words are in the order of :func:`dbf_compile.signs.interleave`.

    Returns:
        [..., N].
    """
    signs = deinterleave(signs) if interleaved else signs
    wide = accumulator_dtype(x.dtype)
    z = x.to(wide) if in_scale is None else x.to(wide) * in_scale.to(wide)
    y = z @ unpack_signs(signs, x.shape[-1], wide).T
    if out_scale is not None:
        y = y * out_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(dtype or wide)


def sign_matmul_transposed(grad: Tensor, signs: Tensor, cols: int, interleaved: bool = False) -> Tensor:
    """Multiply by the transpose: ``g_x[..., k] = Σ_n signs[n, k] · g_y[..., n]``.

    Args:
        grad: floating point [..., N].
        signs: int32 words [N, W].
        cols: K.
        interleaved: as for :func:`sign_matmul`.

    Returns:
        [..., K] in the dtype of the sums.
    """
    signs = deinterleave(signs) if interleaved else signs
    dtype = accumulator_dtype(grad.dtype)
    return grad.to(dtype) @ unpack_signs(signs, cols, dtype)
