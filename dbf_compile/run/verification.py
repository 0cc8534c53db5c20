"""Whether a model comes back as it was: the same tensors by name, and the same answer to one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.batches import random_batches
from dbf_compile.calibration.model_io import call_model, first_tensor, to_device
from dbf_compile.calibration.offload import offloaded
from dbf_compile.checksums import listed
from dbf_compile.errors import ConversionError

_SEED = 0


def differences(
    model: nn.Module,
    other: nn.Module,
    batch: Any,
    blocks: Iterable[str] = (),
    device: torch.device | None = None,
) -> str | None:
    """Return in words how a model differs from another one of the same class, or None if it does not.

    Tensors are compared bit by bit; where their dtypes differ, in the narrower one. Answers to a batch may differ in the last
    half of the digits of their dtype, since sums depend on where tensors lie in memory. Another setting of the class, such as
    an epsilon, shows there and not in any tensor.

    Args:
        model, other: in evaluation mode, on any device.
        batch: as for :func:`~dbf_compile.calibration.model_io.call_model`; None for random tokens or pictures.
        blocks: names of modules that visit the device one at a time.
        device: where to compute; None for where each model is.
    """
    names = changed_tensors(model, other)
    if names:
        return f"other tensors: {listed(names)}"
    batch = random_batch(model) if batch is None else batch
    answers = []
    for one in (model, other):
        try:
            answers.append(_answer(one, batch, list(blocks), device))
        except Exception:  # a batch that was made up may not be what the model reads
            if one is model:
                return None
            raise
    expected, answer = answers
    if expected is None or answer is None:
        return None
    if expected.shape != answer.shape:
        return f"equal tensors, but answers of shape {tuple(answer.shape)}, not {tuple(expected.shape)}"
    distance = _distance(answer, expected)
    allowed = max(torch.finfo(dtype).eps for dtype in (expected.dtype, answer.dtype)) ** 0.5
    return (
        None if distance <= allowed else f"equal tensors, but answers that are {distance:.2g} apart, relative"
    )


def changed_tensors(model: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that only one model has, or whose content differs."""
    one, two = _tensors(model), _tensors(other)
    both = [name for name in one if name in two]
    changed = {name for name in both if not _is_equal(one[name], two[name])}
    return sorted(changed | (one.keys() ^ two.keys()))


def random_batch(model: nn.Module) -> Any:
    """Return a random batch of what a model reads: tokens, pictures or sound; None where nothing says how large it is."""
    generator = torch.Generator().manual_seed(_SEED)
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "input_ids")
    shapes: dict[str, Callable[[], tuple[int, ...]]] = {
        "pixel_values": lambda: (1, config.num_channels, *_pair(config.image_size)),
        "input_values": lambda: (1, 4000),  # a quarter of a second
        "input_features": lambda: (1, config.num_mel_bins, 2 * config.max_source_positions),
    }
    try:
        if name in shapes:
            return {name: torch.randn(shapes[name](), generator=generator)}
        return next(iter(random_batches(model, generator, length=16, count=1)))
    except (AttributeError, TypeError, ConversionError):
        return None


@torch.no_grad()
def _answer(model: nn.Module, batch: Any, blocks: list[str], device: torch.device | None) -> Tensor | None:
    if batch is None:
        return None
    where = device or next(model.parameters()).device
    with (
        torch.random.fork_rng(devices=[]),
        offloaded(model, [model.get_submodule(name) for name in blocks], device),
    ):
        torch.default_generator.manual_seed(_SEED)  # some models draw in evaluation mode, too
        output = first_tensor(call_model(model, to_device(batch, where)))
    return None if output is None else output.cpu()


def _distance(answer: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors; entries that are not finite have to be equal."""
    finite = expected.isfinite()
    if not torch.equal(finite, answer.isfinite()):
        return float("inf")
    difference = (answer.double() - expected.double())[finite].norm()
    return float(difference / expected.double()[finite].norm().clamp_min(torch.finfo(torch.float32).tiny))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in tensors if tensor.numel()}  # an empty one has no content


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        one, other = one.to(narrow), other.to(narrow)
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    # As bytes: NaN equals itself.
    return torch.equal(one, other) or torch.equal(
        one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
