"""Attention over a cache in plain torch: the definition that kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """Attend to the keys up to the position of each query; see ``dbf::cached_attention`` for shapes."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // keys.shape[1]
    k = keys.to(wide).repeat_interleave(group, 1)
    v = values.to(wide).repeat_interleave(group, 1)
    scores = (q.to(wide) * scale) @ k
    if cap > 0:
        scores = cap * (scores / cap).tanh()
    index = torch.arange(keys.shape[-1], device=q.device)
    reads = index <= positions[:, None, :, None]
    if window > 0:
        reads &= index > positions[:, None, :, None] - window
    weights = scores.masked_fill(~reads, -torch.inf).softmax(-1)
    # Whatever lies behind a position, which may be no number, is not read.
    filled = index <= positions.amax(-1)[:, None]
    y = weights @ v.masked_fill(~filled[:, None, :, None], 0)
    return y.transpose(1, 2).to(q.dtype).contiguous()
