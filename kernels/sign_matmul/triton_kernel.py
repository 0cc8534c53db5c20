"""``dbf::sign_matmul`` on GPUs: chooses a Triton kernel and launches it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dbf_compile.kernels.sign_matmul.regimes import Regime, choose_regime, operand_count, operand_dtype
from dbf_compile.kernels.sign_matmul.triton_decode import decode_blocks, decode_grid, decode_kernel
from dbf_compile.kernels.sign_matmul.triton_dequantize import dequantize
from dbf_compile.kernels.sign_matmul.triton_prefill import (
    bf16x3_split,
    prefill_blocks,
    prefill_grid,
    prefill_kernel,
)
from dbf_compile.signs import is_ragged


def sign_matmul_triton(
    x: Tensor,
    signs: Tensor,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    fast: bool = False,
) -> Tensor:
    """Multiply by a sign matrix: ``y[..., n] = out_scale[n] · Σ_k signs[n, k] · in_scale[k] · x[..., k] + bias[n]``.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        signs: int32 words [N, ceil(K / 32)], interleaved, on the same device.
        in_scale: floating point [K], or None for ones.
        out_scale: floating point [N], or None for ones.
        bias: floating point [N], or None for zeros.
        dtype: of the result; None for float32.
        fast: allow a relative error of 1e-4 where that takes less time.

    Returns:
        [..., N].
    """
    M, N, K = math.prod(x.shape[:-1]), signs.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], N), dtype=dtype or torch.float32)
    if y.numel() == 0:
        return y
    signs, ragged = signs.contiguous(), is_ragged(N)
    scales = [None if vector is None else vector.contiguous() for vector in (out_scale, bias)]
    operands, narrow = operand_count(x.dtype, dtype, fast), operand_dtype(x.dtype, dtype)
    regime = choose_regime(M, operands)
    # Triton launches on the current device, not on that of x; -1, the index of a CPU tensor, changes nothing.
    with torch.cuda.device(x.get_device()):
        if regime is Regime.DECODE:
            settings = decode_blocks(M, N, K)[0]
            before = None if in_scale is None else in_scale.contiguous()
            decode_kernel[decode_grid(M, N, settings)](
                x.contiguous(), signs, y, before, *scales, M, N, K, RAGGED=ragged, **settings
            )
        elif regime is Regime.DENSE:
            dense = dequantize(signs, out_scale, K, narrow)
            _dense_matmul(_scaled(x, in_scale).reshape(M, K), dense, bias, y.view(M, N))
        else:
            settings = prefill_blocks(M, N, operands)[0]
            operand = bf16x3_split(_scaled(x, in_scale).reshape(M, K), narrow, operands)
            prefill_kernel[prefill_grid(M, N, settings)](
                operand, signs, y, *scales, M, N, K, operands, ragged, **settings
            )
    return y


def _scaled(x: Tensor, in_scale: Tensor | None) -> Tensor:
    return x if in_scale is None else x.float() * in_scale.float()


def _dense_matmul(z: Tensor, dense: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write ``z · denseᵀ + bias`` to ``y``, with operands of the dtype of ``dense`` and sums of float32."""
    z = z.to(dense.dtype)
    if z.is_cuda and bias is None and y.dtype == dense.dtype:
        torch.mm(z, dense.T, out=y)
        return
    # On the CPU, in Triton's interpreter, mm takes no out_dtype.
    sums = torch.mm(z, dense.T, out_dtype=torch.float32) if z.is_cuda else z.float() @ dense.float().T
    y.copy_(sums if bias is None else sums + bias)
