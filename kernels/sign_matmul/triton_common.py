"""What the Triton kernels for few and for many tokens have in common."""

from __future__ import annotations

import triton
import triton.language as tl


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
