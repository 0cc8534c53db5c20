"""The Triton kernel for many tokens: signs become ±1 in registers, and tensor cores multiply.

Tensor cores take 16-bit numbers. A float32 activation is split into three bfloat16 operands (bf16x3 split),

    x  =  x₀ + x₁ + x₂,   x₀ = upper half of x,  x₁ = upper half of x - x₀,  x₂ = x - x₀ - x₁

which hold all 24 bits; the products of each with ±1 are exact, and sums are float32.

Signs are read byte by byte. One thread hands the eight signs of a byte to the tensor cores, in the order of the columns,
so that Triton finds a layout in which every thread expands the very signs that it multiplies by. With whole words, the
expanded signs had to change threads through shared memory, twice. Tiles of 64 tokens and more use the instructions of
Hopper and Blackwell for groups of warps, which read both operands from shared memory: there the expanded signs are written
once, 16 bytes at a time.

More than a hundred tokens of a 16-bit model share a dense matrix of signs instead (see ``triton_dequantize.py``), which
the device's library multiplies by: that took less time, measured with an earlier kernel.

Shape letters: M rows of x (tokens), K columns and N rows of the sign matrix, W = ceil(K / 32) words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbf_compile.kernels.sign_matmul.triton_common import (
    byte_pointers,
    first_words,
    plus_or_minus,
    store_tile,
)


@triton.jit  # type: ignore[untyped-decorator]
def prefill_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    signs_ptr,
    m,
    n,
    M,
    N,
    K,
    OPERANDS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a tile of y, float32 [BLOCK_M, BLOCK_N]: ``y[m, n] = Σ_t Σ_k signs[n, k] · x[t, m, k]``.

    Args:
        x_ptr: bfloat16 or float16 [OPERANDS, M, K], contiguous.
        signs_ptr: int32 words [N, W], interleaved.
        m: the first row of x, int64.
        n: rows of the sign matrix, int64 [BLOCK_N].
        RAGGED: as for :func:`first_words`.
        BLOCK_K: columns in one step, a multiple of 32.
    """
    number = x_ptr.dtype.element_ty
    minus = -0x407F4080 if number == tl.bfloat16 else -0x43FF4400  # twice the bits of -1
    bytes_of_row = tl.cdiv(K, 32) * 4
    rows, apart = first_words(signs_ptr, n, N, tl.cdiv(K, 32), RAGGED)
    row = (m + tl.arange(0, BLOCK_M))[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        byte = (first // 8 + tl.arange(0, BLOCK_K // 8))[:, None]
        inside = (n[None, :] < N) & (byte < bytes_of_row)
        packed = tl.load(byte_pointers(rows[None, :], apart[None, :], byte), mask=inside, other=0)
        signs = plus_or_minus(packed, minus).to(number, bitcast=True)
        signs = tl.permute(signs, (0, 2, 3, 4, 1)).reshape(BLOCK_K, BLOCK_N)
        k = (first + tl.arange(0, BLOCK_K))[None, :]
        for operand in tl.static_range(OPERANDS):
            # Past the last column x is read as 0, which adds nothing under either sign.
            x = tl.load(x_ptr + (row + operand * M) * K + k, mask=(row < M) & (k < K), other=0.0)
            sums = tl.dot(x, signs, sums)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def prefill_rows(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what this program computes: the first row m of x and the rows n of the sign matrix, int64."""
    # Eight neighbouring tiles of tokens take turns with the same signs, so that both stay in the cache.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (8 * tiles_n) * 8
    together = tl.minimum(tiles_m - first, 8)
    within = tile % (8 * tiles_n)
    m = (first + within % together).to(tl.int64) * BLOCK_M
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
    OPERANDS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute ``y[m, n] = out_scale[n] · Σ_t Σ_k signs[n, k] · x[t, m, k] + bias[n]``, a tile in every program.

    Args:
        x_ptr: bfloat16 or float16 [OPERANDS, M, K], contiguous.
        signs_ptr: int32 words [N, W], interleaved.
        y_ptr: float32, bfloat16 or float16 [M, N], contiguous.
        out_scale_ptr: floating point [N], or None; so bias_ptr.
        RAGGED: as for :func:`first_words`.
    """
    m, n = prefill_rows(M, N, BLOCK_M, BLOCK_N)
    y = prefill_tile(x_ptr, signs_ptr, m, n, M, N, K, OPERANDS, RAGGED, BLOCK_M, BLOCK_N, BLOCK_K)
    store_tile(y_ptr, y, m + tl.arange(0, BLOCK_M), n, M, N, out_scale_ptr, bias_ptr)


# The functions that a template calls, callees first.
DEVICE_FUNCTIONS = (first_words, byte_pointers, plus_or_minus, prefill_tile, prefill_rows)


def bf16x3_split(z: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Split activations into operands that add up to them: [M, K] to ``dtype`` [count, M, K].

    Args:
        z: float32 [M, K]; of any dtype if count is 1.
        dtype: of the operands; bfloat16 if count is not 1.
        count: 3 holds all bits of a float32, 2 holds 16 of 24.
    """
    operands = []
    for _ in range(count - 1):
        upper = (z.view(torch.int32) & -(2**16)).view(torch.float32)
        operands.append(upper.to(dtype))
        # The first operand alone is infinite: infinity minus infinity would be NaN.
        z = torch.where(z.isfinite(), z - upper, 0.0)
    return torch.stack([*operands, z.to(dtype)])


# (BLOCK_M, BLOCK_N, BLOCK_K, warps): cycles of a multiprocessor for 128 columns of such a tile, of its schedulers, counted
# in the machine code for sm_90, and of its tensor cores, at their rate.
_TILES = {
    (16, 32, 128, 4): (143, 52),
    (16, 64, 128, 4): (239, 103),
    (32, 32, 128, 4): (251, 103),
    (32, 64, 64, 4): (358, 205),
    (32, 128, 128, 4): (559, 410),
    (64, 128, 64, 4): (436, 491),
    (64, 256, 64, 8): (837, 982),
    (128, 128, 64, 8): (591, 982),
}
# Of an H100 or H200: its multiprocessors, and the activations that each of them gets from the cache in a cycle.
_MULTIPROCESSORS, _ACTIVATIONS = 132, 14


def prefill_blocks(M: int, N: int, operands: int = 1) -> list[dict[str, int]]:
    """Return the launch settings to tune over, the default first.

    Args:
        M: tokens, or an estimate.
        N: rows of the sign matrix.
        operands: 16-bit numbers that an activation is split into.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
    """

    def cycles(tile: tuple[int, int, int, int]) -> int:
        # The busiest unit limits programs that run one after the other or side by side; the first program also waits for
        # the second busiest.
        busy = sorted((*_TILES[tile], tile[0] * 128 // _ACTIVATIONS))
        programs = -(-M // tile[0]) * -(-N // tile[1])
        return -(-programs // _MULTIPROCESSORS) * busy[-1] + busy[-2]

    tiles = sorted((tile for tile in _TILES if tile[0] < max(2 * M, 32)), key=cycles)
    # Stages are steps on their way from memory: several operands of many steps would overflow shared memory.
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for stages in ((3, 4) if operands == 1 else (2, 3))
        for m, n, k, warps in tiles
    ]


def prefill_grid(
    M: Any, N: Any, blocks: dict[str, Any], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid, as :func:`~dbf_compile.kernels.sign_matmul.triton_decode.decode_grid` does."""
    return (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]), 1, 1)
