"""The Triton kernels for many tokens: signs become ±1 in registers, and tensor cores multiply.

Tensor cores take 16-bit numbers. Activations that have more are cut into a few bfloat16 terms,

    x  =  x₀ + x₁ + x₂,   x₀ = upper half of x,  x₁ = upper half of x - x₀,  x₂ = x - x₀ - x₁

three of which hold all 24 bits of a float32; the products of each with ±1 are exact, and sums are float32.

Signs are the operand that tensor cores read from registers, so that they are expanded once for a tile of tokens and
never written anywhere. That saves memory traffic, but costs the tensor cores half of their rate: for more than a hundred
tokens of a 16-bit model it takes less time to write the signs as a dense matrix, which all tokens then share, and to
multiply by that with the device's library (`benchmarks/results/gpu.md`).

Shape letters: T terms, M rows of x (tokens), K columns and N rows of the sign matrix, W = ceil(K / 32) words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbf_compile.kernels.sign_matmul.triton_common import store_tile


@triton.jit
def plus_or_minus(words, bit, number):  # type: ignore[no-untyped-def]
    """Return a number where a bit of a word is set, else its negative; numbers of 16 bits, the highest one for minus.

    Args:
        number: the bits of a bfloat16 or float16 as int32.
    """
    return (number ^ (((~words << (31 - bit)) >> 16) & 0x8000)).to(tl.int16)


@triton.jit  # type: ignore[untyped-decorator]
def prefill_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    rows,
    m,
    n,
    M,
    N,
    K,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a tile of y, float32 [BLOCK_M, BLOCK_N]: ``y[m, n] = Σ_t Σ_k signs[n, k] · x[t, m, k]``.

    Args:
        x_ptr: bfloat16 or float16 [TERMS, M, K], contiguous.
        rows: pointers to the first int32 word of each row of the tile, [BLOCK_N].
        m: rows of x, int64 [BLOCK_M].
        n: rows of the sign matrix, int64 [BLOCK_N].
        BLOCK_K: columns that are met in one step, a multiple of 32.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    bit = tl.arange(0, 32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = first // 32 + tl.arange(0, BLOCK_K // 32)
        words = tl.load(
            rows[:, None] + w[None, :], mask=(n[:, None] < N) & (w[None, :] < tl.cdiv(K, 32)), other=0
        )
        one = 0x3F80 if x_ptr.dtype.element_ty == tl.bfloat16 else 0x3C00  # the bits of 1.0
        signs = plus_or_minus(words[:, :, None], bit[None, None, :], one)
        signs = signs.to(x_ptr.dtype.element_ty, bitcast=True).reshape(BLOCK_N, BLOCK_K)
        for term in tl.static_range(TERMS):
            # Behind the last column x is read as 0, which adds nothing under either sign.
            row = (m + term * M)[:, None] * K
            x = tl.load(x_ptr + row + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
            sums = tl.dot(signs, tl.trans(x), sums)
    return tl.trans(sums)


@triton.jit  # type: ignore[untyped-decorator]
def prefill_rows(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the rows m of x and n of the sign matrix that this program is for, as int64."""
    # Eight neighbouring tiles of tokens take turns with the same signs: both stay in the cache.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (8 * tiles_n) * 8
    together = tl.minimum(tiles_m - first, 8)
    within = tile % (8 * tiles_n)
    m = (first + within % together).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // together).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit  # type: ignore[untyped-decorator]
def prefill_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    signs_ptr,
    y_ptr,
    out_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute ``y[m, n] = out_scale[n] · Σ_t Σ_k signs[n, k] · x[t, m, k] + bias[n]``, a tile in every program.

    Args:
        x_ptr: bfloat16 or float16 [TERMS, M, K], contiguous.
        signs_ptr: int32 words [N, W], contiguous.
        y_ptr: float32, bfloat16 or float16 [M, N], contiguous.
        out_scale_ptr: floating point [N], or None; so bias_ptr.
    """
    m, n = prefill_rows(M, N, BLOCK_M, BLOCK_N)
    rows = signs_ptr + n * tl.cdiv(K, 32)
    y = prefill_tile(x_ptr, rows, m, n, M, N, K, TERMS, BLOCK_M, BLOCK_N, BLOCK_K)
    store_tile(y_ptr, y, m, n, M, N, out_scale_ptr, bias_ptr)


@triton.jit  # type: ignore[untyped-decorator]
def expand_kernel(signs_ptr, scale_ptr, w_ptr, K, W, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``w[n, k] = scale[n] · signs[n, k]``, words of one row in every program.

    Args:
        signs_ptr: int32 words [N, W], contiguous.
        scale_ptr: of the dtype of w [N], or None for ones.
        w_ptr: bfloat16 or float16 [N, K], contiguous.
    """
    tile, tiles = tl.program_id(0), tl.cdiv(W, BLOCK_W)
    n = (tile // tiles).to(tl.int64)
    w = tile % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    words = tl.load(signs_ptr + n * W + w, mask=w < W, other=0)
    bit = tl.arange(0, 32)
    if scale_ptr is not None:
        number = tl.load(scale_ptr + n).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        number = 0x3F80 if w_ptr.dtype.element_ty == tl.bfloat16 else 0x3C00  # the bits of 1.0
    numbers = plus_or_minus(words[:, None], bit[None, :], number).to(w_ptr.dtype.element_ty, bitcast=True)
    k = w[:, None] * 32 + bit[None, :]
    tl.store(w_ptr + n * K + k, numbers, mask=k < K)


# What a template needs beside its own text, callees first.
DEVICE_FUNCTIONS = (plus_or_minus, prefill_tile, prefill_rows)


def expand_signs(signs: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix ``w[n, k] = scale[n] · signs[n, k]`` of ``dtype`` [N, K].

    Args:
        signs: int32 words [N, W], contiguous.
        scale: floating point [N], which is rounded to ``dtype``, or None for ones.
        columns: K.
        dtype: bfloat16 or float16.
    """
    N, W = signs.shape
    dense = torch.empty(N, columns, dtype=dtype, device=signs.device)
    if W == 0:
        return dense
    block = min(128, triton.next_power_of_2(W))
    grid = (N * triton.cdiv(W, block), 1, 1)
    scale = None if scale is None else scale.to(dtype).contiguous()
    expand_kernel[grid](signs, scale, dense, columns, W, BLOCK_W=block)
    return dense


def operand_dtype(x: torch.dtype, result: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which tensor cores get activations of dtype ``x`` for a result of dtype ``result``.

    A 16-bit model keeps its dtype, as its dense layers do: that of the activations, else that of the result.
    """
    narrow = (torch.bfloat16, torch.float16)
    return x if x in narrow else result if result in narrow else torch.bfloat16


def term_count(x: torch.dtype, result: torch.dtype | None, fast: bool = False) -> int:
    """Return how many terms hold an activation: one in a 16-bit model, else three, or two for fast sums."""
    narrow = (torch.bfloat16, torch.float16)
    return 1 if x in narrow or result in narrow else 2 if fast else 3


def split_terms(z: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Cut activations into terms that add up to them: [M, K] to ``dtype`` [terms, M, K]; several terms of float32 only."""
    parts = []
    for _ in range(terms - 1):
        upper = (z.view(torch.int32) & -(2**16)).view(torch.float32)
        parts.append(upper.to(dtype))
        # What is infinite is so in the first term; infinity minus infinity would be undefined.
        z = torch.where(z.isfinite(), z - upper, 0.0)
    return torch.stack([*parts, z.to(dtype)])


def prefill_blocks(M: int, N: int, capability: int = 90) -> list[dict[str, int]]:
    """Return the launch settings that are worth trying, the one for use without trying first.

    Args:
        M: tokens, or a guess.
        N: rows of the sign matrix.
        capability: of the device, 10 times the major number plus the minor one.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
    """
    # A tile of 256 tokens halves the work of expanding signs, but spills where sums do not go to tensor cores directly.
    largest = 256 if capability in (90, 100, 103) else 128
    block_m = min(largest, max(16, 1 << (M - 1).bit_length()))
    # What few tokens cost an H200 is waiting: more programs, fewer rows each. Others, where this was not measured, spill.
    small = largest == 256 and block_m <= 128
    best = _settings(block_m, 64 if small or N <= 64 else 128, 128 if small or block_m <= 64 else 64, 3)
    others = [
        _settings(block_m, block_n, block_k, stages)
        for block_m in (16, 32, 64, 128, 256)
        for block_n, block_k, stages in ((64, 128, 3), (128, 64, 3), (128, 64, 4), (128, 128, 3))
        if block_m <= min(largest, 2 * M) and block_m * block_k <= 256 * 64
    ]
    return [best, *(settings for settings in others if settings != best)]


def _settings(block_m: int, block_n: int, block_k: int, stages: int) -> dict[str, int]:
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": stages,
    }


def prefill_grid(
    M: Any, N: Any, blocks: dict[str, Any], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid, as :func:`dbf_compile.kernels.sign_matmul.triton_decode.decode_grid`."""
    return (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]), 1, 1)
