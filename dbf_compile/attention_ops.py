"""The operator of attention over a cache: schema, fake implementation, derivatives, devices.

    dbf::cached_attention(q, keys, values, positions, scale, window, cap)
        y[b, t, h] = Σ_k softmax_k(scale · q[b, h, t] · keys[b, h', :, k]) · values[b, h', k],  k ≤ positions[b, t]

with h' = h // (H / H'): several heads of queries may read one head of keys. A ``window`` above 0 leaves the last so many keys;
a ``cap`` above 0 makes scores s to cap · tanh(s / cap). Keys lie transposed, so that scores are sums of whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbf_compile import derivatives
from dbf_compile.errors import KernelInputError
from dbf_compile.kernels.cached_attention import cpu_kernel
from dbf_compile.kernels.cached_attention.reference import cached_attention as cached_attention_reference

_library = torch.library.Library("dbf", "FRAGMENT")
_library.define(
    "cached_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, float scale, int window=0, "
    "float cap=0.0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
    fits = (
        all(tensor.dim() == 4 for tensor in (q, keys, values))
        and positions.shape == (q.shape[0], q.shape[2])
        and keys.shape[0] == values.shape[0] == q.shape[0]
        and keys.shape[1] == values.shape[1]
        and q.shape[1] % keys.shape[1] == 0
        and (keys.shape[2], keys.shape[3]) == (q.shape[3], values.shape[2])
        and q.dtype == keys.dtype == values.dtype
    )
    if not fits:
        raise KernelInputError(
            f"queries {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, positions {tuple(positions.shape)}",
            "[B, H, T, D], [B, H', D, L], [B, H', L, V] of one dtype, and [B, T]",
            "check the cache that keys and values come from",
        )


def _default(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    _check(q, keys, values, positions)
    return cached_attention_reference(q, keys, values, positions, scale, window, cap)


def _cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    _check(q, keys, values, positions)
    if not cpu_kernel.takes(q.dtype):
        return cached_attention_reference(q, keys, values, positions, scale, window, cap)
    return cpu_kernel.cached_attention_cpu(q, keys, values, positions, scale, window, cap)


def _fake(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    _check(q, keys, values, positions)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[-1]))


def _autograd(keys: Any, *args: Any) -> Tensor:
    """Compute by the reference, of which torch knows the derivatives, where somebody asks for them."""
    if derivatives.asked_for(args[:3]):
        _check(*args[:4])
        return cached_attention_reference(*args)
    below = keys.remove(keys.highestPriorityTypeId())
    y: Tensor = torch.ops.dbf.cached_attention.default.redispatch(below, *args)
    return y


_library.impl("cached_attention", _autograd, "Autograd", with_keyset=True)
_library.impl("cached_attention", _default, "CompositeExplicitAutograd")
_library.impl("cached_attention", _cpu, "CPU")
torch.library.register_fake("dbf::cached_attention", _fake, lib=_library)


def empty_cache(
    sizes: Sequence[tuple[int, int, int, torch.dtype]], rows: int, length: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys [rows, H, D, length] and values [rows, H, length, V] of every layer, all 0."""
    keys = [torch.zeros(rows, H, D, length, dtype=dtype, device=device) for H, D, _, dtype in sizes]
    values = [torch.zeros(rows, H, length, V, dtype=dtype, device=device) for H, _, V, dtype in sizes]
    return keys, values
