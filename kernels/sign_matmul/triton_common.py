"""Device functions that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def first_words(signs_ptr, n, N, W, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return pointers to the first words of rows n, and the stride between words of a row, both [BLOCK_N].

    Args:
        signs_ptr: int32 words [N, W], interleaved.
        n: rows of the sign matrix, int64 [BLOCK_N]; int32 where N * W is below 2**31.
        RAGGED: N is not a multiple of 16; the rows of the incomplete last block are stored one by one.
    """
    # 16 is BLOCK_ROWS of dbf_compile.signs; this text becomes part of templates, which see no module.
    first = (n & -16) * W + (n & 15)
    apart = tl.full(n.shape, 16, tl.int32)
    if RAGGED:
        interleaved = n < N // 16 * 16
        first = tl.where(interleaved, first, n * W)
        apart = tl.where(interleaved, apart, 1)
    return signs_ptr + first, apart


@triton.jit
def byte_pointers(rows, apart, byte):  # type: ignore[no-untyped-def]
    """Return pointers to bytes of rows, eight signs each, in the broadcast shape of the arguments.

    Args:
        rows, apart: as :func:`first_words` returns them.
        byte: index of a byte in its row.
    """
    return rows.to(tl.pointer_type(tl.uint8)) + byte // 4 * (4 * apart) + byte % 4


@triton.jit
def plus_or_minus(signs, minus):  # type: ignore[no-untyped-def]
    """Return a number where a bit is 1, else its negative: int16 [..., 2, 2, 2], from the lowest bit of a byte on.

    Args:
        signs: bytes, uint8 [...].
        minus: the bits of the negative number, bfloat16 or float16, in both halves of an int32; scalar, or [..., 1, 1].
    """
    # Two numbers at once: bit j stays at j, and bit j + 1 moves to j + 16; one shift then makes both sign bits.
    pairs = signs.to(tl.int32) * 0x8001
    pairs = tl.join(pairs, pairs >> 4)
    pairs = tl.join(pairs, pairs >> 2)
    pairs = ((pairs << 15) & -0x7FFF8000) ^ minus
    return tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))


@triton.jit
def store_tile(y_ptr, y, m, n, M, N, out_scale_ptr, bias_ptr):  # type: ignore[no-untyped-def]
    """Store ``out_scale[n] · y[m, n] + bias[n]`` where m < M and n < N.

    Args:
        y_ptr: float32, bfloat16 or float16 [M, N], contiguous.
        y: the tile, float32 [BLOCK_M, BLOCK_N].
        m: its rows, int64 [BLOCK_M].
        n: its columns, int64 [BLOCK_N].
        out_scale_ptr: floating point [N], or None; so bias_ptr.
    """
    if out_scale_ptr is not None:
        y = y * tl.load(out_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=(m[:, None] < M) & (n[None, :] < N))
