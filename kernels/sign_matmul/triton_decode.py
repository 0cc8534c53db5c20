"""The Triton kernel for few tokens: signs choose which activations are added, and nothing else is computed.

    Σ_k signs[n, k] · x[m, k]  =  2 · Σ_{k: signs[n, k] = +1} x[m, k]  -  Σ_k x[m, k]

The first sum skips, the second is common to all rows. A thread holds whole words and the 32 activations that belong to
each: which bit it tests is known at compile time, so that a sign costs one test and one predicated addition for every
token. The test is shared by the tokens. (Flipping the sign bit of x costs one operation more: a shift.)

Where the result is not finite, because x is not or because the doubled sum is too large, it is computed once more with
the sum of ±x, as the definition says.

Shape letters: M rows of x (tokens), K columns and N rows of the sign matrix, W = ceil(K / 32) words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from dbf_compile import signs as layout
from dbf_compile.kernels.sign_matmul.triton_common import store_tile


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no stubs, and types the arguments at launch
def add_bits(sums, words, x, BIT: tl.constexpr, STEP: tl.constexpr, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the activations of bits BIT, BIT + STEP, ... of each word to its sums.

    Args:
        sums: float32 [BLOCK_M, BLOCK_N, BLOCK_W].
        words: int32 [BLOCK_N, BLOCK_W].
        x: float32 [BLOCK_M, BLOCK_W, 32 / STEP].
        SIGNED: whether to subtract where the sign is -1, instead of skipping.
    """
    if STEP == 32:
        plus = (words < 0 if BIT == 31 else (words & (1 << BIT)) != 0)[None, :, :]
        column = x.reshape(x.shape[0], 1, x.shape[1])
        if SIGNED:
            return tl.where(plus, sums + column, sums - column)
        else:
            return tl.where(plus, sums + column, sums)
    else:
        even, odd = tl.split(x.reshape(x.shape[0], x.shape[1], 16 // STEP, 2))
        sums = add_bits(sums, words, even, BIT, 2 * STEP, SIGNED)
        return add_bits(sums, words, odd, BIT + STEP, 2 * STEP, SIGNED)


@triton.jit  # type: ignore[untyped-decorator]
def sum_columns(  # type: ignore[no-untyped-def]
    x_ptr,
    in_scale_ptr,
    rows,
    m,
    n,
    M,
    N,
    K,
    SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Return a tile of y in one of two ways; arguments as for :func:`decode_tile`, SIGNED as for :func:`add_bits`."""
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_W), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    for first in range(0, tl.cdiv(K, 32), BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        words = tl.load(
            rows[:, None] + w[None, :], mask=(n[:, None] < N) & (w[None, :] < tl.cdiv(K, 32)), other=0
        )
        k = w[:, None] * 32 + tl.arange(0, 32)[None, :]
        # Behind the last column x is read as 0, which adds nothing under either sign.
        inside = (m[:, None, None] < M) & (k[None, :, :] < K)
        x = tl.load(x_ptr + m[:, None, None] * K + k[None, :, :], mask=inside, other=0.0).to(tl.float32)
        if in_scale_ptr is not None:
            x = x * tl.load(in_scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :, :]
        sums = add_bits(sums, words, x, 0, 1, SIGNED)
        total += tl.sum(x, axis=2)
    y = tl.sum(sums, axis=2)
    if SIGNED:
        return y
    else:
        return y + y - tl.sum(total, axis=1)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def decode_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    in_scale_ptr,
    rows,
    m,
    n,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Return a tile of y, float32 [BLOCK_M, BLOCK_N]: ``y[m, n] = Σ_k signs[n, k] · in_scale[k] · x[m, k]``.

    Args:
        x_ptr: float32, bfloat16 or float16 [M, K], contiguous.
        in_scale_ptr: floating point [K], or None for ones.
        rows: pointers to the first int32 word of each row of the tile, [BLOCK_N].
        m: rows of x, int64 [BLOCK_M].
        n: rows of the sign matrix, int64 [BLOCK_N].
        BLOCK_W: words of a row that are met in one step.
    """
    y = sum_columns(x_ptr, in_scale_ptr, rows, m, n, M, N, K, False, BLOCK_M, BLOCK_N, BLOCK_W)
    size = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if tl.max(tl.max(size, axis=1), axis=0) >= 0x7F800000:
        y = sum_columns(x_ptr, in_scale_ptr, rows, m, n, M, N, K, True, BLOCK_M, BLOCK_N, BLOCK_W)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def decode_rows(M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the rows m of x and n of the sign matrix that this program is for, as int64."""
    # Tiles of the same signs are neighbours, so that these are read from memory once.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    # 64 bits: m * K, n * W and m * N may pass 2**31.
    m = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    signs_ptr,
    y_ptr,
    in_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Compute ``y[m, n] = out_scale[n] · Σ_k signs[n, k] · in_scale[k] · x[m, k] + bias[n]``, a tile in every program.

    Args:
        x_ptr: float32, bfloat16 or float16 [M, K], contiguous.
        signs_ptr: int32 words [N, W], contiguous.
        y_ptr: float32, bfloat16 or float16 [M, N], contiguous.
        in_scale_ptr: floating point [K], or None; so out_scale_ptr and bias_ptr, [N].
    """
    m, n = decode_rows(M, BLOCK_M, BLOCK_N)
    rows = signs_ptr + n * tl.cdiv(K, 32)
    y = decode_tile(x_ptr, in_scale_ptr, rows, m, n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_W)
    store_tile(y_ptr, y, m, n, M, N, out_scale_ptr, bias_ptr)


# What a template needs beside its own text, callees first.
DEVICE_FUNCTIONS = (add_bits, sum_columns, decode_tile, decode_rows)


def decode_blocks(M: int, N: int, K: int) -> list[dict[str, int]]:
    """Return the launch settings that are worth trying, the one for use without trying first.

    Args:
        M: tokens.
        N: rows of the sign matrix.
        K: columns of the sign matrix.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_W, num_warps, num_stages.
    """
    W = max(layout.words_per_row(K), 1)
    block_m = 1 if M == 1 else 2  # the activations of two tokens are 64 registers of a thread
    best_w = _block_of_words(W)
    tiles_m = -(-M // block_m)
    # Two programs for each of an H100's 132 multiprocessors, if there are rows enough.
    rows = next((size for size in (16, 8, 4) if tiles_m * -(-N // size) >= 264), 4)
    best = _settings(block_m, min(rows, 16 // block_m), best_w, N)
    others = [
        _settings(block_m, block_n, block_w, N)
        for block_n in (4, 8, 16, 32)
        for block_w in (32, 64, 128, 256)
        if block_n * block_m <= 32 and block_w <= 2 * best_w
    ]
    return [best, *(settings for settings in others if settings != best)]


def _block_of_words(W: int) -> int:
    # Large steps hide the latency of memory; but words behind the last one are computed all the same.
    for size in (128, 64, 32):
        if size < 2 * W and -(-W // size) * size <= 1.15 * W:
            return size
    return min(32, 1 << (W - 1).bit_length())


def _settings(block_m: int, block_n: int, block_w: int, N: int) -> dict[str, int]:
    # One word of each row for each thread.
    block_n = min(block_n, 1 << max(N - 1, 0).bit_length())
    warps = max(1, min(4, block_w // 32))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_W": block_w, "num_warps": warps, "num_stages": 1}


def decode_grid(
    M: Any, N: Any, blocks: dict[str, Any], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid; ``cdiv`` rounds up a quotient of what M is: a number or an expression.

    One dimension holds all tiles, because the second and third are limited to 65535 programs.
    """
    return (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]), 1, 1)
