"""The Triton kernel for many tokens: signs become ±1 in registers, and tensor cores multiply.

Tensor cores take 16-bit numbers. Activations that have more are cut into a few bfloat16 terms,

    x  =  x₀ + x₁ + x₂,   x₀ = upper half of x,  x₁ = upper half of x - x₀,  x₂ = x - x₀ - x₁

three of which hold all 24 bits of a float32; the products of each with ±1 are exact, and sums are float32.

Signs are read byte by byte: the eight signs of a byte are what one thread hands to the tensor cores, in the order of the
columns, so that Triton finds a layout in which every thread expands the very signs that it multiplies by. With whole
words the expanded signs had to change threads through shared memory, twice. Tiles of 64 tokens and more go to the
instructions of Hopper and Blackwell for groups of warps, which read both operands from shared memory: there the
expanded signs are written once, 16 bytes at a time.

For more than a hundred tokens of a 16-bit model signs are written as a dense matrix, which all tokens then share, and the
device's library multiplies by that: it took less time, when this was measured with an earlier kernel.

Shape letters: T terms, M rows of x (tokens), K columns and N rows of the sign matrix, W = ceil(K / 32) words.
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
        BLOCK_K: columns that are met in one step, a multiple of 32.
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
        for term in tl.static_range(OPERANDS):
            # Behind the last column x is read as 0, which adds nothing under either sign.
            x = tl.load(x_ptr + (row + term * M) * K + k, mask=(row < M) & (k < K), other=0.0)
            sums = tl.dot(x, signs, sums)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def prefill_rows(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what this program is for: the first row m of x and the rows n of the sign matrix, int64."""
    # Eight neighbouring tiles of tokens take turns with the same signs: both stay in the cache.
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


# What a template needs beside its own text, callees first.
DEVICE_FUNCTIONS = (first_words, byte_pointers, plus_or_minus, prefill_tile, prefill_rows)


def operand_dtype(x: torch.dtype, result: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which tensor cores get activations of dtype ``x`` for a result of dtype ``result``.

    A 16-bit model keeps its dtype, as its dense layers do: that of the activations, else that of the result.
    """
    narrow = (torch.bfloat16, torch.float16)
    return x if x in narrow else result if result in narrow else torch.bfloat16


def operand_count(x: torch.dtype, result: torch.dtype | None, fast: bool = False) -> int:
    """Return how many terms hold an activation: one in a 16-bit model, else three, or two for fast sums."""
    narrow = (torch.bfloat16, torch.float16)
    return 1 if x in narrow or result in narrow else 2 if fast else 3


def bf16x3_split(z: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Cut activations into terms that add up to them: [M, K] to ``dtype`` [terms, M, K]; several terms of float32 only."""
    parts = []
    for _ in range(terms - 1):
        upper = (z.view(torch.int32) & -(2**16)).view(torch.float32)
        parts.append(upper.to(dtype))
        # What is infinite is so in the first term; infinity minus infinity would be undefined.
        z = torch.where(z.isfinite(), z - upper, 0.0)
    return torch.stack([*parts, z.to(dtype)])


# BLOCK_M, BLOCK_N, BLOCK_K and warps; and what 128 columns of such a tile keep busy, in cycles of a multiprocessor: its
# schedulers, counted in the machine code for sm_90, and its tensor cores, at their rate.
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
# Of an H100 or H200: activations that come from its cache in a cycle, for each of its multiprocessors.
_MULTIPROCESSORS, _ACTIVATIONS = 132, 14


def prefill_blocks(M: int, N: int, terms: int = 1) -> list[dict[str, int]]:
    """Return the launch settings that are worth trying, the one for use without trying first.

    Args:
        M: tokens, or a guess.
        N: rows of the sign matrix.
        terms: of an activation.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
    """

    def cycles(tile: tuple[int, int, int, int]) -> int:
        # Programs that run one after the other, or side by side, wait for what is busiest; the first one for the next, too.
        busy = sorted((*_TILES[tile], tile[0] * 128 // _ACTIVATIONS))
        programs = -(-M // tile[0]) * -(-N // tile[1])
        return -(-programs // _MULTIPROCESSORS) * busy[-1] + busy[-2]

    tiles = sorted((tile for tile in _TILES if tile[0] < max(2 * M, 32)), key=cycles)
    # Steps on their way from memory: several terms of several steps would fill the shared memory.
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for stages in ((3, 4) if terms == 1 else (2, 3))
        for m, n, k, warps in tiles
    ]


def prefill_grid(
    M: Any, N: Any, blocks: dict[str, Any], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid, as :func:`dbf_compile.kernels.sign_matmul.triton_decode.decode_grid`."""
    return (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]), 1, 1)
