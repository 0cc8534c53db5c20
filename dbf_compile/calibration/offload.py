"""Onload and offload: the blocks of a model visit a device one at a time.

The tensors of a block are copied to the device for every call of the block, and the copies are dropped after it. Where
gradients are computed, the activations inside a block are not kept: the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbf_compile.machine import with_index


@dataclass
class Recomputation:
    """Whether a block is being computed again for the backward pass, for hooks that must run only once.

    Attributes:
        running: set by :func:`offloaded`.
    """

    running: bool = False


@contextmanager
def offloaded(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device | str | None,
    recomputation: Recomputation | None = None,
) -> Iterator[None]:
    """Compute a model on ``device`` with at most one of ``blocks`` there; the rest of the model stays there throughout.

    Args:
        model: its tensors are back where they were at the end.
        blocks: modules of ``model``; each is onloaded for its forward call, and once more for its backward pass.
        device: None does nothing.
        recomputation: is told when a block is computed again.
    """
    if device is None:
        yield
        return
    recomputation = recomputation or Recomputation()
    device = with_index(device)
    # A container is never called: the tensors in it stay on the device.
    blocks = [block for block in dict.fromkeys(blocks) if type(block).forward is not nn.Module.forward]
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    homes = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in inside]
    try:
        for tensor, _ in homes:
            tensor.data = tensor.data.to(device)
        for block in blocks:
            block.forward = _onloading_forward(block, device, recomputation)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for tensor, data in homes:
            tensor.data = data


def _onloading_forward(
    block: nn.Module, device: torch.device, recomputation: Recomputation
) -> Callable[..., Any]:
    """Return a forward function that onloads the block for as long as it computes."""
    forward = block.forward

    def onloading_forward(*args: Any, **kwargs: Any) -> Any:
        calls = 0

        def compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            recomputation.running = calls > 1
            try:
                with _onloaded(block, device):
                    return forward(*args, **kwargs)
            finally:
                recomputation.running = False

        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return onloading_forward


@contextmanager
def _onloaded(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace the tensors of a block that are elsewhere by constant copies on ``device``.

    Autograd may keep the copies for the backward pass; setting ``tensor.data`` would change them under it.
    """
    copies: dict[int, Tensor] = {}
    homes: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in block.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in tables:
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
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; every module has its own mode again at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def without_kv_cache(model: nn.Module) -> Iterator[None]:
    """Turn the cache of keys and values of a transformers model off: a block that is computed twice would attend to both."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    if hasattr(configs[0], "get_text_config"):
        configs.append(configs[0].get_text_config(decoder=True))
    caching = {
        id(config): (config, config.use_cache) for config in configs if getattr(config, "use_cache", None)
    }
    try:
        for config, _ in caching.values():
            config.use_cache = False
        yield
    finally:
        for config, cached in caching.values():
            config.use_cache = cached


def blocks_of(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Return a transformer's blocks by name: the members of the outermost ``nn.ModuleList``s that hold one of ``layers``.

    Encoders and decoders, towers of text and of pictures each have such a list.
    """
    prefixes = {name[:place] for name in layers for place, letter in enumerate(name) if letter == "."}
    blocks: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        # A list inside a block, such as its experts, is no list of blocks.
        if isinstance(module, nn.ModuleList) and name in prefixes and not name.startswith(tuple(lists)):
            lists.append(f"{name}.")
            blocks |= {f"{name}.{index}": block for index, block in enumerate(module)}
    return blocks
