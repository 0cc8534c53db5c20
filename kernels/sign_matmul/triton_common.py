"""What the Triton kernels have in common."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def first_words(signs_ptr, n, N, W, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return pointers to the first words of rows n, and how many words apart the words of each row lie, both [BLOCK_N].

    Args:
        signs_ptr: int32 words [N, W], interleaved.
        n: rows of the sign matrix, int64 [BLOCK_N]; int32 where N * W is below 2**31.
        RAGGED: N is not a multiple of 16, so that the last rows lie one after the other.
    """
    # 16 is BLOCK_ROWS of dbf_compile.signs; a template holds this text and sees no name of a module.
    first = (n & -16) * W + (n & 15)
    apart = tl.full(n.shape, 16, tl.int32)
    if RAGGED:
        interleaved = n < N // 16 * 16
        first = tl.where(interleaved, first, n * W)
        apart = tl.where(interleaved, apart, 1)
    return signs_ptr + first, apart


@triton.jit
def byte_pointers(rows, apart, byte):  # type: ignore[no-untyped-def]
    """Return pointers to bytes of rows, eight signs each, in the shape that the arguments have together.

    Args:
        rows, apart: as :func:`first_words` returns them.
        byte: number of a byte in its row.
    """
    return rows.to(tl.pointer_type(tl.uint8)) + byte // 4 * (4 * apart) + byte % 4


@triton.jit
def plus_or_minus(signs, minus):  # type: ignore[no-untyped-def]
    """Return a number where a bit is set, else its negative: int16 [..., 2, 2, 2], the bits of a byte from the lowest one on.

    Args:
        signs: bytes, uint8 [...].
        minus: the bits of the negative number, a bfloat16 or float16, in both halves of an int32; scalar, or [..., 1, 1].
    """
    # Two numbers at once: bit j stays at j, and bit j + 1 comes to j + 16; so one shift puts both where signs belong.
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
