"""Inputs and outputs of models: how a batch is passed, and which tensors batches and outputs hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.errors import ConversionError


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, a sequence of arguments, or a mapping of keyword arguments.

    Raises:
        ConversionError: the batch has another type.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise ConversionError(
        f"a batch of type {type(batch).__name__}",
        "a tensor, a sequence or a mapping",
        "pass a tensor, [tensor] or {name: tensor}",
    )


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with all its tensors on ``device``; sequences become lists, mappings dictionaries."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def token_ids(batch: Any) -> Tensor | None:
    """Return the token ids of a batch: ``input_ids`` of a mapping, the first entry of a sequence, or the batch itself.

    None where that is no tensor of integers.
    """
    ids = batch
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and batch:
        ids = batch[0]
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        return ids
    return None


def attention_mask(batch: Any) -> Tensor | None:
    """Return which positions of a batch are no padding, as bool [batch, tokens]; None without an ``attention_mask``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def first_tensor(output: Any) -> Tensor | None:
    """Return ``last_hidden_state`` of a model's output, else its first floating-point tensor, else None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        return None
    return next((tensor for value in values if (tensor := first_tensor(value)) is not None), None)


def is_causal(model: nn.Module) -> bool:
    """Return whether a model predicts every token from the tokens before it alone."""
    generates = getattr(model, "can_generate", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(generates) and bool(generates()) and not encoder_decoder


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: ``output.logits``, or the output itself."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
