"""Losses for calibration: gradient moments of layers are moments of the gradient of a loss.

| name | loss | for |
|---|---|---|
| ``"model"`` | the loss that the model computes from labels in the batch | models with labelled batches |
| ``"next_token"`` | cross-entropy of every token given those before it | causal language models |
| ``"sampled"`` | cross-entropy of labels drawn from the model's own prediction | masked language models, classifiers |
| ``"output"`` | ⟨g, output⟩, g standard normal | encoders: no labels, no prediction |
| ``"auto"`` | the first of these that fits the model and the batch | |

"sampled" and "output" stand in for missing labels. With "sampled", E[(∂loss/∂y)²] is the diagonal of the Fisher
information of the model's prediction; with "output" it is that of Jᵀ J, J the Jacobian of the output, which is the
curvature of half the squared change of the output. Both treat a position that matters to the output as important,
whatever its label would have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import (
    attention_mask,
    first_tensor,
    is_causal,
    next_tokens,
    token_ids,
)
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.options import LOSSES

Loss = Callable[[Any, Any], Tensor]


def loss_named(name: str, model: nn.Module, generator: torch.Generator) -> Loss:
    """Return the loss ``name`` for ``model``: a function of (output of the model, batch) to a scalar.

    Args:
        name: one of ``LOSSES``.
        model: "auto" chooses by its kind.
        generator: on the CPU; the random losses draw from it.

    Raises:
        OptionError: an unknown name.
    """
    if name == "auto":
        return _Auto(model, generator)
    if name == "model":
        return output_loss
    if name == "next_token":
        return next_token_loss
    if name == "sampled":
        return lambda output, batch: sampled_loss(output, batch, generator)
    if name == "output":
        return lambda output, batch: projected_output(output, batch, generator)
    raise OptionError(
        f"loss={name!r}",
        ", ".join(map(repr, LOSSES)),
        "pass one of them, a function, or None for inputs only",
    )


class _Auto:
    """The first loss that fits the output and the batch, in the order of the table above."""

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self._generator = generator
        self._causal = is_causal(model)

    def __call__(self, output: Any, batch: Any) -> Tensor:
        if isinstance(getattr(output, "loss", None), Tensor):
            return output_loss(output, batch)
        if isinstance(getattr(output, "logits", None), Tensor):
            if self._causal and token_ids(batch) is not None:
                return next_token_loss(output, batch)
            return sampled_loss(output, batch, self._generator)
        return projected_output(output, batch, self._generator)


def output_loss(output: Any, batch: Any) -> Tensor:
    """Return ``output.loss``, which models of transformers compute from labels.

    Raises:
        ConversionError: the output has no loss.
    """
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConversionError(
            f"a model output of type {type(output).__name__} without a loss",
            "an output whose .loss is a tensor",
            "put labels into the batches, or pass loss=lambda output, batch: ...",
        )
    return loss


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy, in nats, of each token given those before it; padding does not count.

    Args:
        output: logits [batch, tokens, vocabulary], or an object with ``logits``.
        batch: token ids [batch, tokens], or a mapping with ``input_ids`` and possibly ``attention_mask``.

    Raises:
        ConversionError: there are no logits or no token ids, or sequences have a single token.
    """
    logits, ids = _logits(output), token_ids(batch)
    if ids is None or ids.dim() != 2 or ids.shape[1] < 2 or logits.shape[:2] != ids.shape:
        got = "no token ids" if ids is None else f"token ids of shape {tuple(ids.shape)}"
        raise ConversionError(
            f"{got} for logits of shape {tuple(logits.shape)}",
            "input_ids [batch, tokens] with two tokens or more",
            "pass batches of token ids, or another loss",
        )
    labels = next_tokens(ids, batch).to(logits.device)
    # The last position predicts nothing; without it there is less to compute.
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, :-1].flatten())


def sampled_loss(output: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy, in nats, of labels drawn from the model's own prediction.

    Args:
        output: logits [..., classes], or an object with ``logits``.
        batch: its ``attention_mask``, where it has one, marks padding, which does not count.
        generator: on the CPU; draws the labels.

    Raises:
        ConversionError: there are no logits.
    """
    logits = _logits(output)
    chances = torch.softmax(logits.detach().float(), dim=-1).cpu().flatten(0, -2)
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
    mask = attention_mask(batch)
    if mask is not None and mask.shape == logits.shape[:-1]:
        labels = labels.masked_fill(~mask.to(logits.device).flatten(), -100)
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels)


def projected_output(output: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """Return ``⟨g, output⟩ / √size`` with g standard normal; padding does not count.

    Args:
        output: a tensor, an object with ``last_hidden_state``, or a sequence or mapping, of which the first floating-point
            tensor counts.
        batch: its ``attention_mask``, where it has one, marks padding.
        generator: on the CPU; draws g.

    Raises:
        ConversionError: the output has no floating-point tensor.
    """
    tensor = first_tensor(output)
    if tensor is None:
        raise ConversionError(
            f"a model output of type {type(output).__name__} without a floating-point tensor",
            "a tensor, or an output that holds one",
            "pass loss=lambda output, batch: ...",
        )
    weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device)
    mask = attention_mask(batch)
    if mask is not None and tensor.dim() == 3 and mask.shape == tensor.shape[:2]:
        weights = weights * mask.to(tensor.device)[..., None]
    return (weights * tensor.float()).sum() / math.sqrt(tensor.numel())


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ConversionError(
            f"a model output of type {type(output).__name__} without logits",
            "logits [..., classes]",
            "use loss='output' for a model that predicts nothing",
        )
    return logits
