"""The Triton kernel of ``dbf::sign_matmul``: signs are flipped by XOR, and all that remains is addition.

A float keeps its sign in its highest bit, so that ``-x`` is ``x`` with this bit flipped, for every x. With +1
stored as bit 1 and -1 as bit 0,

    signs[n, k] · x[m, k]  =  float(bits(-x[m, k]) ^ (bit[n, k] << 31))

which is exact and needs no multiplication.

Shape letters: M rows of x (tokens, all leading dimensions together), K columns and N rows of the sign matrix,
W = ceil(K / 32) words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbf_compile import signs as layout

# A kernel can read a global only if it is a constexpr.
WORD_BITS = tl.constexpr(layout.WORD_BITS)
SIGN_BIT = tl.constexpr(-(2**31))


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no stubs, and types the arguments at launch
def sign_matmul_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    signs_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Multiply by a sign matrix: ``y[m, n] = Σ_k signs[n, k] · x[m, k]``; one program makes one tile of y.

    Args:
        x_ptr: float32, bfloat16 or float16 [M, K], contiguous.
        signs_ptr: int32 words [N, W], contiguous.
        y_ptr: float32 [M, N], contiguous.
        BLOCK_M: rows of the tile.
        BLOCK_N: columns of the tile.
        BLOCK_W: words of a sign row that are met in one step.
    """
    W = tl.cdiv(K, WORD_BITS)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    # 64 bits: m * K, n * W and m * N may pass 2**31.
    m = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    bit = tl.arange(0, WORD_BITS)
    # The tensor stands first: with it behind, Triton's interpreter makes the difference a constexpr.
    to_sign_bit = -bit + (WORD_BITS - 1)

    # Every bit of a step has its own sum: no threads talk to each other before the last word.
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_W, WORD_BITS), dtype=tl.float32)
    for first in range(0, W, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        k = w[:, None] * WORD_BITS + bit[None, :]
        # Behind the last column x is read as 0, which adds nothing under either sign.
        x = tl.load(
            x_ptr + m[:, None, None] * K + k[None, :, :],
            mask=(m[:, None, None] < M) & (k[None, :, :] < K),
            other=0.0,
        )
        words = tl.load(
            signs_ptr + n[:, None] * W + w[None, :], mask=(n[:, None] < N) & (w[None, :] < W), other=0
        )
        # Negate each x once, flip it back where the bit is 1: inverting the words costs an operation a sign.
        minus_x = x.to(tl.float32).to(tl.int32, bitcast=True) ^ SIGN_BIT
        flips = (words[:, :, None] << to_sign_bit[None, None, :]) & SIGN_BIT
        sums += (minus_x[:, None, :, :] ^ flips[None, :, :, :]).to(tl.float32, bitcast=True)

    y = tl.sum(tl.sum(sums, axis=3), axis=2)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=(m[:, None] < M) & (n[None, :] < N))


def block_sizes(M: int, N: int, K: int) -> dict[str, int]:
    """Choose the tile of one program; the same sizes always give the same tile.

    Args:
        M: rows of x, or a guess where the true number is not known yet: any tile is correct for any M.
        N: rows of the sign matrix.
        K: columns of the sign matrix.

    Returns:
        The constexpr arguments of :func:`sign_matmul_kernel`.
    """
    # 4 · 16 · 4 · 32 sums are 64 registers for each thread of 4 warps; with 16 rows the code of sm_90 spills.
    return {
        "BLOCK_M": _power_of_two(M, at_most=4),
        "BLOCK_N": _power_of_two(N, at_most=16),
        "BLOCK_W": _power_of_two(layout.words_per_row(K), at_most=4),
    }


def _power_of_two(size: int, at_most: int) -> int:
    return min(at_most, 1 << max(size - 1, 0).bit_length())


def grid(
    M: Any, N: Any, blocks: Mapping[str, int], cdiv: Callable[[Any, Any], Any] = triton.cdiv
) -> tuple[Any, int, int]:
    """Return the launch grid, one program for each tile of y, as three sizes.

    One dimension holds all tiles, because the second and third are limited to 65535 programs.

    Args:
        M: rows of x: an int, or an expression for which ``cdiv`` can round up a quotient.
        N: rows of the sign matrix, likewise.
        blocks: what :func:`block_sizes` chose.
        cdiv: ``ceil(a / b)``.
    """
    return (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]), 1, 1)


def sign_matmul_triton(x: Tensor, signs: Tensor) -> Tensor:
    """Multiply by a sign matrix with additions only: ``y[..., n] = Σ_k signs[n, k] · x[..., k]``.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        signs: int32 words [N, ceil(K / 32)], on the same device.

    Returns:
        float32 [..., N].
    """
    M, N, K = math.prod(x.shape[:-1]), signs.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], N), dtype=torch.float32)
    if y.numel() == 0:
        return y
    blocks = block_sizes(M, N, K)
    # Triton launches on the current device, not on that of x; the -1 of a CPU tensor changes nothing.
    with torch.cuda.device(x.get_device()):
        sign_matmul_kernel[grid(M, N, blocks)](
            x.contiguous(), signs.contiguous(), y, M, N, K, **blocks, enable_fp_fusion=False
        )
    return y
