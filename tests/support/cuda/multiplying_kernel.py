"""The same product by multiplication with ±1, which a check for additions must refuse."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiplying_kernel(  # noqa: PLR0913  a kernel
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
    """Multiply one row of x by one sign row in every program; arguments as in the real kernel."""
    m = tl.program_id(0) // N
    n = tl.program_id(0) % N
    bit = tl.arange(0, 32)
    sums = tl.zeros((BLOCK_W, 32), dtype=tl.float32)
    for first in range(0, tl.cdiv(K, 32), BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        k = w[:, None] * 32 + bit[None, :]
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        words = tl.load(signs_ptr + n * tl.cdiv(K, 32) + w, mask=w < tl.cdiv(K, 32), other=0)
        weight = ((words[:, None] >> bit[None, :]) & 1) * 2 - 1
        sums += x * weight.to(tl.float32)
    tl.store(y_ptr + m * N + n, tl.sum(tl.sum(sums, axis=1), axis=0))
