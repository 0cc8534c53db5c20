"""The Triton kernel that dequantizes signs: it writes a dense matrix, which many tokens share.

A tile is 16 rows, whose words are interleaved: they are read side by side and written row by row.

Shape letters: N rows and K columns of the sign matrix, W = ceil(K / 32) words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbf_compile.kernels.sign_matmul.triton_common import byte_pointers, first_words, plus_or_minus
from dbf_compile.signs import BLOCK_ROWS, is_ragged


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_tile(  # type: ignore[no-untyped-def]
    signs_ptr,
    scale_ptr,
    n,
    k,
    N,
    W,
    NUMBER: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a tile of w, NUMBER [BLOCK_N, BLOCK_K]: ``w[n, k] = scale[n] · signs[n, k]``.

    Args:
        signs_ptr: int32 words [N, W], interleaved.
        scale_ptr: floating point [N], which is rounded to NUMBER, or None for ones.
        n: rows, int64 [BLOCK_N].
        k: the first column, divisible by 32.
        NUMBER: bfloat16 or float16.
        RAGGED: as for :func:`first_words`.
        BLOCK_K: a multiple of 32.
    """
    byte = (k // 8 + tl.arange(0, BLOCK_K // 8))[None, :]
    rows, apart = first_words(signs_ptr, n, N, W, RAGGED)
    inside = (n[:, None] < N) & (byte < W * 4)
    signs = tl.load(byte_pointers(rows[:, None], apart[:, None], byte), mask=inside, other=0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(NUMBER)
        bits = scale.to(tl.int16, bitcast=True).to(tl.int32)[:, None, None, None] & 0xFFFF
    else:
        bits = 0x3F80 if tl.bfloat16 == NUMBER else 0x3C00  # of 1.0
    minus = bits ^ 0x8000
    return plus_or_minus(signs, minus | (minus << 16)).to(NUMBER, bitcast=True).reshape(BLOCK_N, BLOCK_K)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_rows(K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what this program computes: rows n, int64, and the first column k."""
    tiles = tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, tl.program_id(0) % tiles * BLOCK_K


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(  # type: ignore[no-untyped-def]
    signs_ptr, scale_ptr, w_ptr, N, K, RAGGED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Write ``w[n, k] = scale[n] · signs[n, k]``, a tile in every program.

    Args:
        signs_ptr, scale_ptr, RAGGED: as for :func:`dequantize_tile`.
        w_ptr: bfloat16 or float16 [N, K], contiguous.
    """
    n, k = dequantize_rows(K, BLOCK_N, BLOCK_K)
    number = w_ptr.dtype.element_ty
    w = dequantize_tile(signs_ptr, scale_ptr, n, k, N, tl.cdiv(K, 32), number, RAGGED, BLOCK_N, BLOCK_K)
    k += tl.arange(0, BLOCK_K)
    tl.store(w_ptr + n[:, None] * K + k[None, :], w, mask=(n[:, None] < N) & (k[None, :] < K))


# The functions that a template calls, callees first.
DEVICE_FUNCTIONS = (first_words, byte_pointers, plus_or_minus, dequantize_tile, dequantize_rows)


def dequantize_blocks(K: int) -> list[dict[str, int]]:
    """Return the launch settings to tune over, the default first: BLOCK_N, BLOCK_K, num_warps, num_stages."""
    widest = max(32, triton.next_power_of_2(K))
    every = [
        {"BLOCK_N": BLOCK_ROWS, "BLOCK_K": min(columns, widest), "num_warps": warps, "num_stages": 1}
        for columns, warps in ((512, 4), (256, 4), (1024, 8))
    ]
    return [settings for index, settings in enumerate(every) if settings not in every[:index]]


def dequantize_grid(
    N: Any, K: Any, blocks: dict[str, Any], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid, as :func:`~dbf_compile.kernels.sign_matmul.triton_decode.decode_grid` does."""
    return (cdiv(N, blocks["BLOCK_N"]) * cdiv(K, blocks["BLOCK_K"]), 1, 1)


def dequantize(signs: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix ``w[n, k] = scale[n] · signs[n, k]`` of ``dtype`` [N, K].

    Args:
        signs: int32 words [N, W], interleaved, contiguous.
        scale: floating point [N], which is rounded to ``dtype``, or None for ones.
        columns: K.
        dtype: bfloat16 or float16.
    """
    N = signs.shape[0]
    dense = torch.empty(N, columns, dtype=dtype, device=signs.device)
    if columns == 0:
        return dense
    blocks = dequantize_blocks(columns)[0]
    scale = None if scale is None else scale.contiguous()
    dequantize_kernel[dequantize_grid(N, columns, blocks)](
        signs, scale, dense, N, columns, is_ragged(N), **blocks
    )
    return dense
