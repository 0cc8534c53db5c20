"""Inputs and outputs of models: how a batch is passed, and which tensors batches and outputs hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.errors import ConversionError, first_line
from dbf_compile.machine import multiplies_bfloat16, narrow_products

# Inputs that no text gives.
_NOT_TEXT = frozenset(
    {"pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values", "bbox"}
)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, a sequence of arguments, or a mapping of keyword arguments.

    Of token ids alone an encoder-decoder gets what its decoder needs as well (:func:`with_decoder_inputs`), and a model of
    text and pictures in two towers, such as CLIP, runs its tower of text.

    Raises:
        ConversionError: the batch has another type, or the model needs more than it holds.
    """
    batch = with_decoder_inputs(model, batch)
    lacking = _lacking(model, batch)
    text_alone = getattr(model, "get_text_features", None) if lacking and not predicts_tokens(model) else None
    called = text_alone if callable(text_alone) else model
    try:
        if isinstance(batch, Tensor):
            return called(batch)
        if isinstance(batch, Mapping):
            return called(**batch)
        if isinstance(batch, (tuple, list)):
            return called(*batch)
    except (TypeError, ValueError, AttributeError) as error:
        if not lacking:
            raise
        raise ConversionError(
            f"tokens alone for {type(model).__name__}, which fails on them ({first_line(error)})",
            f"batches of all that it reads: {', '.join(lacking)} too",
            "pass batches=[{name: tensor}], as its processor makes them, or no data",
        ) from error
    raise ConversionError(
        f"a batch of type {type(batch).__name__}",
        "a tensor, a sequence or a mapping",
        "pass a tensor, [tensor] or {name: tensor}",
    )


def with_decoder_inputs(model: nn.Module, batch: Any) -> Any:
    """Return a batch of token ids with what the decoder of an encoder-decoder needs; all others as they are.

    The decoder is to repeat what the encoder reads: the ids are its labels, but for padding, and transformers shifts them
    to the right for its inputs. So logits, labels, ids and mask have one shape.
    """
    ids = token_ids(batch)
    if ids is None or not is_encoder_decoder(model) or not isinstance(batch, (Tensor, Mapping)):
        return batch
    rest = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if any(name == "labels" or name.startswith("decoder_") or name == "encoder_outputs" for name in rest):
        return batch
    if predicts_tokens(model):
        mask = attention_mask(batch)
        return {**rest, "labels": ids if mask is None else ids.masked_fill(~mask, -100)}
    config: Any = model.config
    starts = (
        getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    )
    inputs = ids.roll(1, dims=-1)
    inputs[..., 0] = next((start for start in starts if start is not None), 0)
    return {**rest, "decoder_input_ids": inputs}


def reads_tokens(model: nn.Module) -> bool:
    """Return whether a model takes ``input_ids``; models of speech or pictures do not."""
    return "input_ids" in _inputs(model) or not _inputs(model) & _NOT_TEXT


def check_reads_tokens(model: nn.Module) -> None:
    """Refuse a model to which text says nothing.

    Raises:
        ConversionError: the model takes no ``input_ids``.
    """
    if not reads_tokens(model):
        raise ConversionError(
            f"text for {type(model).__name__}",
            f"what it reads: {', '.join(sorted(_NOT_TEXT & _inputs(model)))}",
            "pass batches=[{name: tensor}], as its processor makes them, or no data",
        )


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many tokens a model knows, or None where its configuration does not say."""
    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(config, "vocab_size", None), int) and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _inputs(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _lacking(model: nn.Module, batch: Any) -> list[str]:
    """Return the names of inputs other than text that a model takes, where a batch holds nothing but text."""
    text = isinstance(batch, Tensor) and token_ids(batch) is not None
    if isinstance(batch, Mapping):
        text = token_ids(batch) is not None and not _NOT_TEXT & set(batch)
    return sorted(_NOT_TEXT & _inputs(model)) if text else []


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


def predicted_ids(batch: Any) -> Tensor | None:
    """Return the ids at whose positions a model predicts: those of the decoder where a batch has them, else all."""
    for name in ("labels", "decoder_input_ids") if isinstance(batch, Mapping) else ():
        ids = batch.get(name)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return ids
    return token_ids(batch)


def attention_mask(batch: Any) -> Tensor | None:
    """Return which positions of a batch are no padding, as bool [batch, tokens]; None without an ``attention_mask``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def output_mask(model: nn.Module, batch: Any) -> Tensor | None:
    """Return which positions of a model's output are no padding, as bool [batch, tokens]; None where all count.

    They are those of the decoder where there is one: its labels say it, else its own mask.
    """
    if not (isinstance(batch, Mapping) and is_encoder_decoder(model)):
        return attention_mask(batch)
    labels, mask = (batch.get(name) for name in ("labels", "decoder_attention_mask"))
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != -100
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    return None if any(name.startswith("decoder_") for name in batch) else attention_mask(batch)


def next_tokens(ids: Tensor, batch: Any) -> Tensor:
    """Return what each position of a causal model is to predict, int64 [batch, tokens], and -100 where there is nothing.

    Args:
        ids: tokens of the batch, int64 [batch, tokens].
        batch: its ``attention_mask``, where it has one, marks padding, which is not predicted and predicts nothing.
    """
    labels, mask = ids[:, 1:], attention_mask(batch)
    if mask is not None and mask.shape == ids.shape:
        mask = mask.to(ids.device)
        labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return nn.functional.pad(labels, (0, 1), value=-100)


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
    return predicts_tokens(model) and not is_encoder_decoder(model)


def predicts_tokens(model: nn.Module) -> bool:
    """Return whether a model generates: its logits are of the next token."""
    generates = getattr(model, "can_generate", None)
    return callable(generates) and bool(generates())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model has a decoder that reads the states of an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@torch.no_grad()
def computes_narrowly(model: nn.Module, batch: Any, device: torch.device | None = None) -> bool:
    """Return whether a model on the CPU gains by :func:`~dbf_compile.machine.narrow_products`, and reads a batch that way.

    Few models mix dtypes badly, or compute numbers that are not finite. ``device`` is where the model is to compute, None for
    where it is.
    """
    own = next(model.parameters()).device
    if {own.type, (device or own).type} != {"cpu"} or not multiplies_bfloat16("cpu"):
        return False
    try:
        with narrow_products(own):
            output = first_tensor(call_model(model, batch))
    except RuntimeError:
        return False
    return output is not None and bool(torch.isfinite(output).all())


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: ``output.logits``, or the output itself."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
