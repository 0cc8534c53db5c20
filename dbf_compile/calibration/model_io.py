"""How a model is called, and what its batches and outputs hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.errors import ConversionError


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, or the sequence or mapping of its arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise ConversionError(
        f"a batch of type {type(batch).__name__}",
        "a tensor, a sequence or a mapping",
        "wrap it in one of these",
    )


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with all its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def token_ids(batch: Any) -> Tensor | None:
    """Return the token ids of a batch: its ``input_ids``, or the batch itself or its first entry if integers."""
    found = batch
    if isinstance(batch, Mapping):
        found = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    if isinstance(found, Tensor) and not found.is_floating_point():
        return found
    return None


def attention_mask(batch: Any) -> Tensor | None:
    """Return which positions of a batch are no padding, as bool [batch, tokens]; None where it does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of a model's output, ``last_hidden_state`` where there is one, or None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        return None
    return next((found for value in values if (found := first_tensor(value)) is not None), None)


def is_causal(model: nn.Module) -> bool:
    """Return whether a model predicts every token from those before it alone."""
    generates = getattr(model, "can_generate", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(generates) and bool(generates()) and not encoder_decoder


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: ``output.logits``, or the output itself."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found
