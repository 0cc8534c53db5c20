"""Onload and offload: blocks of a model visit a device one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbf_compile.machine import with_index


@contextmanager
def offloaded(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device | str | None,
    run: _Run | None = None,
) -> Iterator[None]:
    """Let each block visit ``device`` for its turn, forward and backward; the rest of the model stays there."""
    if device is None:
        yield
        return
    run = run or _Run(None)
    device = with_index(device)
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    homes = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in inside]
    try:
        for tensor, _ in homes:
            tensor.data = tensor.data.to(device)
        for block in blocks:
            block.forward = _visiting(block, run, device)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for tensor, data in homes:
            tensor.data = data


def _visiting(block: nn.Module, run: _Run, device: torch.device) -> Callable[..., Any]:
    forward = block.forward

    def visit(*args: Any, **kwargs: Any) -> Any:
        calls = 0

        def compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            run.again = calls > 1
            try:
                with _copied(block, device):
                    return forward(*args, **kwargs)
            finally:
                run.again = False

        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return visit


@contextmanager
def _copied(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a block have constant copies on ``device`` of those of its tensors that are elsewhere.

    Autograd may keep the copies for the backward pass; ``tensor.data = copy`` would pull them away from under it.
    """
    copies: dict[int, Tensor] = {}
    homes: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in block.modules():
            every: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in every:
                for name, tensor in tensors.items():
                    if tensor is None or tensor.device == device:
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().to(device)
                    homes.append((tensors, name, tensor))
                    tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in homes:
            tensors[name] = tensor


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def without_kv_cache(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers keep no keys and values: a block that computes twice would attend to both."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    cached = getattr(config, "use_cache", None)
    if not cached:
        yield
        return
    try:
        config.use_cache = False
        yield
    finally:
        config.use_cache = cached


def blocks_of(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Return a transformer's blocks by name: the members of the longest list of modules that holds one of ``layers``."""
    names = list(layers)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(layer.startswith(f"{name}.") for layer in names)
    }
    # A list inside of a block (the experts of one) is no list of blocks.
    outermost = {
        name: {f"{name}.{index}": block for index, block in enumerate(blocks)}
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }
    return max(outermost.values(), key=len, default={})


@dataclass
class _Run:
    """What the hooks need to know of the batch that flows: its padding, and whether this is a second pass."""

    anchor: Tensor | None
    mask: Tensor | None = None
    again: bool = False
