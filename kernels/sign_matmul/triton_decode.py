"""The Triton kernel for few tokens: it looks up sums of four activations and computes nothing but additions.

Four neighbouring signs are a number from 0 to 15. For every four columns and each token a look-up table (LUT) holds the
sixteen sums ±x₀ ± x₁ ± x₂ ± x₃; a row then costs one look-up and one addition for every four of its signs. The LUTs of a
tile lie in shared memory, with the sixteen numbers in sixteen different banks: threads that hold neighbouring rows read
them without conflict, whatever the signs. All tokens share the shift and mask that turn signs into a number.

The words of 16 rows are interleaved, so that neighbouring threads load neighbouring words and get those of their own rows.
With rows one after the other, words had to change threads through shared memory in every step.

Compared with adding activations one by one, chosen or negated by their signs, this takes half of the instructions for
one token and less for several; `benchmarks/results/gpu.md` has the measurements.

Split-K: several programs may share the columns of a row, each of which writes a partial sum. The next kernel adds the
partial sums when it reads y.

Shape letters: M rows of x (tokens), K columns and N rows of the sign matrix, W = ceil(K / 32) words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from dbf_compile import signs as layout
from dbf_compile.kernels.sign_matmul.triton_common import first_words, store_tile


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no stubs, and types the arguments at launch
def build_lut(  # type: ignore[no-untyped-def]
    x_ptr,
    in_scale_ptr,
    m,
    k,
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_SPLIT_K: tl.constexpr,
):
    """Return the LUTs of a tile, float32 [BLOCK_M · BLOCK_K · 4], token by token.

    A LUT holds the 16 sums ±x₀ ± x₁ ± x₂ ± x₃ of four columns; bit j of an entry's index is the sign of x_j.

    Args:
        x_ptr, in_scale_ptr, X_SPLIT_K: as for :func:`decode_tile`.
        m: the first row of x.
        k: the first column, divisible by 4.
    """
    # Four neighbouring threads fill a LUT, four entries each: they store side by side, in all banks. One dimension holds
    # all threads, because Triton's versions differ in which of several dimensions go to neighbours.
    quarter = tl.arange(0, BLOCK_M * BLOCK_K)
    row = m + quarter // BLOCK_K
    column = (k + quarter % BLOCK_K // 4 * 4)[:, None] + tl.arange(0, 4)[None, :]
    # Past the last column x is read as 0, which adds nothing under either sign.
    inside = (row[:, None] < M) & (column < K)
    x = tl.load(x_ptr + row[:, None] * K + column, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, X_SPLIT_K):
        x += tl.load(x_ptr + (row[:, None] + split * M) * K + column, mask=inside, other=0.0).to(tl.float32)
    if in_scale_ptr is not None:
        x = x * tl.load(in_scale_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    even, odd = tl.split(x.reshape(BLOCK_M * BLOCK_K, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    upper = tl.where((quarter & 1) != 0, x2, -x2) + tl.where((quarter & 2) != 0, x3, -x3)
    equal, unequal = x0 + x1, x0 - x1
    four = tl.join(tl.join(upper - equal, upper - unequal), tl.join(upper + unequal, upper + equal))
    return four.reshape(BLOCK_M * BLOCK_K * 4)


@triton.jit  # type: ignore[untyped-decorator]
def look_up(luts, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the signed sums of every 32 columns, float32 [BLOCK_M, BLOCK_W, BLOCK_N].

    Args:
        luts: as :func:`build_lut` returns them.
        words: int32 [BLOCK_W, BLOCK_N], as :func:`load_words` returns them.
    """
    nibble = tl.arange(0, 8)
    # The index of a LUT's first entry, in the order of columns, one token's LUTs after the other's. Words are counted
    # from BLOCK_W on, and BLOCK_W is subtracted again: else the compiler of Triton 3.6 shares these numbers with the
    # addresses of the words, and then adds at run time what could be a constant in every address of an entry.
    word = tl.arange(BLOCK_W, 2 * BLOCK_W) * 128 - BLOCK_W * 128
    first = word[None, :, None] | (nibble * 16)[:, None, None]
    of_token = (tl.arange(0, BLOCK_M) * (BLOCK_W * 128))[:, None, None, None]
    signs = (words[None, :, :] >> (4 * nibble)[:, None, None]) & 15
    index = (first + signs)[None, :, :, :] + of_token
    # Flat: Triton would gather from two dimensions by exchanging entries between the threads of a warp.
    sums = tl.gather(luts, index.reshape(BLOCK_M * 8 * BLOCK_W * BLOCK_N), axis=0)
    return tl.sum(sums.reshape(BLOCK_M, 8, BLOCK_W, BLOCK_N), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def load_words(rows, apart, w, inside, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return words w of rows, 0 where not inside: int32 [BLOCK_W, BLOCK_N].

    Args:
        rows, apart: as :func:`first_words` returns them.
        w: int32 [BLOCK_W].
        inside: [BLOCK_W, BLOCK_N].
    """
    # Flat, so that neighbouring threads load words of neighbouring rows, whatever Triton infers about the addresses.
    where = (rows[None, :] + w[:, None] * apart[None, :]).reshape(BLOCK_W * BLOCK_N)
    words = tl.load(where, mask=inside.reshape(BLOCK_W * BLOCK_N), other=0)
    return words.reshape(BLOCK_W, BLOCK_N)


@triton.jit  # type: ignore[untyped-decorator]
def decode_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    in_scale_ptr,
    rows,
    apart,
    split,
    m,
    n,
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    X_SPLIT_K: tl.constexpr = 1,
):
    """Return a tile of y, summed over one split of the columns: float32 [BLOCK_M, BLOCK_N].

    ``y[m, n] = Σ_k signs[n, k] · in_scale[k] · Σ_t x[t, m, k]``, k in the split

    Args:
        x_ptr: float32, bfloat16 or float16 [X_SPLIT_K, M, K], contiguous; X_SPLIT_K partial sums of x.
        in_scale_ptr: floating point [K], or None for ones.
        rows, apart: of the rows of the tile, as :func:`first_words` returns them.
        split: which of SPLIT_K equal splits of the columns is summed.
        m: the first row of x, int64.
        n: rows of the sign matrix, int64 [BLOCK_N].
        BLOCK_W: words of a row in one step.
    """
    W: tl.constexpr = (K + 31) // 32
    WORDS: tl.constexpr = (W + SPLIT_K * BLOCK_W - 1) // (SPLIT_K * BLOCK_W) * BLOCK_W
    sums = tl.zeros((BLOCK_M, BLOCK_W, BLOCK_N), dtype=tl.float32)
    word = tl.arange(0, BLOCK_W)
    start = split * WORDS
    w = start + word
    words = load_words(rows, apart, w, (w[:, None] < W) & (n[None, :] < N), BLOCK_N, BLOCK_W)
    for step in range(0, WORDS, BLOCK_W):
        # Prefetch: the next words are on their way from memory while these are looked up.
        w = start + step + BLOCK_W + word
        inside = (w[:, None] < W) & (n[None, :] < N) & (step + BLOCK_W < WORDS)
        next_words = load_words(rows, apart, w, inside, BLOCK_N, BLOCK_W)
        k = (start + step) * 32
        luts = build_lut(x_ptr, in_scale_ptr, m, k, M, K, BLOCK_M, BLOCK_W * 32, X_SPLIT_K)
        sums += look_up(luts, words, BLOCK_M, BLOCK_N, BLOCK_W)
        words = next_words
    return tl.sum(sums, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def decode_rows(M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what this program computes: the split of the columns, the first row m of x, the rows n of the sign matrix."""
    # Tiles of the same signs are neighbours, so that the signs are read from memory once.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) // SPLIT_K
    # 64 bits: m * K, n * W and m * N may pass 2**31.
    m = (tile % tiles_m).to(tl.int64) * BLOCK_M
    n = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.program_id(0) % SPLIT_K, m, n


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
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RAGGED: tl.constexpr,
    X_SPLIT_K: tl.constexpr = 1,
):
    """Compute the partial sums of y, a tile in every program.

    ``y[s, m, n] = out_scale[n] · Σ_k signs[n, k] · in_scale[k] · Σ_t x[t, m, k] + bias[n]``, k in split s

    Args:
        x_ptr: float32, bfloat16 or float16 [X_SPLIT_K, M, K], contiguous.
        signs_ptr: int32 words [N, W], interleaved.
        y_ptr: float32, bfloat16 or float16 [SPLIT_K, M, N], contiguous.
        in_scale_ptr: floating point [K], or None; so out_scale_ptr and bias_ptr, [N].
        RAGGED: as for :func:`first_words`.
    """
    split, m, n = decode_rows(M, BLOCK_M, BLOCK_N, SPLIT_K)
    rows, apart = first_words(signs_ptr, n, N, (K + 31) // 32, RAGGED)
    y = decode_tile(
        x_ptr, in_scale_ptr, rows, apart, split, m, n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_W, SPLIT_K, X_SPLIT_K
    )
    y_ptr += split.to(tl.int64) * M * N
    store_tile(y_ptr, y, m + tl.arange(0, BLOCK_M), n, M, N, out_scale_ptr, bias_ptr)


# The functions that a template calls, callees first.
DEVICE_FUNCTIONS = (first_words, build_lut, look_up, load_words, decode_tile, decode_rows)


def choose_split_k(M: int, N: int, K: int) -> int:
    """Return the split-K factor; the reader of y adds the partial sums.

    Programs of a single step are best: while one waits for its signs or its LUTs, others add. More than four partial sums
    cost the next kernel too much to read. Large matrices have programs enough and were slower with split-K.

    Args:
        M, N, K: as for :func:`decode_blocks`.
    """
    steps = max(-(-layout.words_per_row(K) // 32), 1)
    if M > 1 or (steps > 4 and N > 16384):
        return 1
    most = 2 if steps > 4 and N > 8192 else 4
    return -(-steps // -(-steps // most))  # equal splits of whole steps, none of them empty


def decode_blocks(M: int, N: int, K: int, split_k: int = 1) -> list[dict[str, int]]:
    """Return the launch settings to tune over, the default first.

    Args:
        M: tokens.
        N: rows of the sign matrix.
        K: columns of the sign matrix.
        split_k: splits of the columns, see :func:`choose_split_k`.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_W, SPLIT_K, num_warps, num_stages. All were timed on an H200, with rows of words one
            after the other.
    """
    W = max(layout.words_per_row(K), 1)
    if split_k > 1:
        block_m = 1
        best = (64 if split_k * -(-N // 64) >= 128 else 32, 32, 8)
        tiles = [(32, 32, 4), (32, 32, 8), (64, 32, 4), (128, 32, 8), (64, 64, 8)]
    elif M == 1:
        # One tile of rows for each of 132 multiprocessors, and as many columns at once as shared memory holds; or half as
        # many if much less of a row is then left over. With many rows, smaller tiles: several share a multiprocessor.
        block_m = 1
        if N > 16384:
            best = (64, 32, 8)
        elif N > 8192 or W <= 32:
            best = (32, 32, 8)
        elif N > 132 * 32:
            best = (64, 64, 16)
        else:
            best = (32, 128 if 8 * -(-W // 128) < 5 * -(-W // 64) else 64, 16)
        tiles = [(32, 32, 4), (32, 64, 8), (32, 64, 16), (64, 32, 4), (64, 64, 8), (64, 64, 16), (128, 32, 8)]
    elif N <= 8192:
        block_m = 2 if M <= 8 else 4
        best = (32, 64, 8) if M == 2 else (64, 32, 8) if M <= 8 else (128, 16, 8)
        tiles = [(32, 64, 8), (64, 32, 4), (128, 32, 8), (128, 16, 8), (128, 32, 16)]
    else:
        block_m = 2 if M == 2 else 4 if M <= 8 else 8
        best = (64, 32, 8) if M == 2 else (64, 16, 4) if M <= 4 else (128, 16 if M <= 8 else 8, 8)
        tiles = [(64, 32, 4), (64, 16, 8), (128, 8, 8), (128, 16, 8), (128, 32, 16)]
    every = [_settings(block_m, tile, N, W, split_k) for tile in (best, *tiles)]
    return [settings for index, settings in enumerate(every) if settings not in every[:index]]


def _settings(block_m: int, tile: tuple[int, int, int], N: int, W: int, split_k: int) -> dict[str, int]:
    block_n, block_w, warps = tile
    block_n = min(block_n, 1 << max(N - 1, 0).bit_length())
    # LUTs of 64 KB at most, and no more words than there are.
    block_w = min(block_w, 128 // block_m, 1 << (W - 1).bit_length())
    warps = max(1, min(warps, block_n * block_w // 32))
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_W": block_w, "SPLIT_K": split_k}
    return {**blocks, "num_warps": warps, "num_stages": 1}


def decode_grid(
    M: Any, N: Any, blocks: dict[str, Any], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid.

    One dimension holds all tiles, because the second and third are limited to 65535 programs.

    Args:
        M, N: of y; numbers, or expressions of Inductor.
        blocks: one of :func:`decode_blocks`.
        cdiv: rounds up a quotient of such numbers or expressions.
    """
    return (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]) * blocks["SPLIT_K"], 1, 1)
