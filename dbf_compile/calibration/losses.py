"""Losses of calibration: what the gradient moments of the layers are taken of.

| name | loss | for |
|---|---|---|
| ``"model"`` | what the model computes itself from the labels in the batch | anything with labels |
| ``"next_token"`` | cross-entropy of every token given those before it | causal language models |
| ``"sampled"`` | cross-entropy of labels drawn from the model's own prediction | masked language models, classifiers |
| ``"output"`` | ⟨g, output⟩, g standard normal | encoders: no labels, no prediction |
| ``"auto"`` | the first of these that fits | |

The last two are surrogates for missing labels. E[(∂loss/∂y)²] is then the diagonal of the Fisher information of
the model's prediction, or of Jᵀ J, J the Jacobian of the output: the curvature of half the squared change of the
output. Both treat a position that matters to the output as important, whatever the label would have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import attention_mask, first_tensor, is_causal, token_ids
from dbf_compile.errors import ConversionError, OptionError

Loss = Callable[[Any, Any], Tensor]
LOSSES = ("auto", "model", "next_token", "sampled", "output")


def loss_named(name: str, model: nn.Module, generator: torch.Generator) -> Loss:
    """Return the loss ``name`` for ``model``: a function of (output of the model, batch) to a scalar.

    Args:
        name: one of ``LOSSES``.
        model: what "auto" decides on.
        generator: on the CPU; the random losses draw from it.

    Raises:
        OptionError: another name.
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
    """Return ``output.loss``, which models of transformers compute themselves when given labels.

    Raises:
        ConversionError: the output has none.
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
    """Return the mean cross-entropy of each token given those before it; padding does not count.

    Args:
        output: logits [batch, tokens, vocabulary], or an object with ``logits``.
        batch: token ids, or a mapping with ``input_ids`` and possibly ``attention_mask``.

    Raises:
        ConversionError: no logits, no token ids, or sequences of a single token.
    """
    logits, ids = _logits(output), token_ids(batch)
    if ids is None or ids.dim() != 2 or ids.shape[1] < 2 or logits.shape[:2] != ids.shape:
        got = "no token ids" if ids is None else f"token ids of shape {tuple(ids.shape)}"
        raise ConversionError(
            f"{got} for logits of shape {tuple(logits.shape)}",
            "input_ids [batch, tokens] with two tokens or more",
            "pass batches of token ids, or another loss",
        )
    labels = ids.to(logits.device)[:, 1:]
    mask = attention_mask(batch)
    if mask is not None:
        labels = labels.masked_fill(~mask.to(logits.device)[:, 1:], -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())


def sampled_loss(output: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy of labels drawn from the model's own prediction.

    Args:
        output: logits [..., classes], or an object with ``logits``.
        batch: not looked at, except for an ``attention_mask``: padding does not count.
        generator: draws the labels, on the CPU.

    Raises:
        ConversionError: no logits.
    """
    logits = _logits(output)
    chances = torch.softmax(logits.detach().float(), dim=-1).cpu().flatten(0, -2)
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
    mask = attention_mask(batch)
    if mask is not None and mask.shape == logits.shape[:-1]:
        labels = labels.masked_fill(~mask.to(logits.device).flatten(), -100)
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels)


def projected_output(output: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """Return ``⟨g, output⟩ / √size`` with g standard normal; of padded positions nothing counts.

    Args:
        output: a tensor, an object with ``last_hidden_state``, or a sequence or mapping whose first tensor counts.
        batch: not looked at, except for an ``attention_mask``.
        generator: draws g, on the CPU.

    Raises:
        ConversionError: no floating-point tensor in the output.
    """
    found = first_tensor(output)
    if found is None:
        raise ConversionError(
            f"a model output of type {type(output).__name__} without a floating-point tensor",
            "a tensor, or an output that holds one",
            "pass loss=lambda output, batch: ...",
        )
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float32).to(found.device)
    mask = attention_mask(batch)
    if mask is not None and found.dim() == 3 and mask.shape == found.shape[:2]:
        weights = weights * mask.to(found.device)[..., None]
    return (weights * found.float()).sum() / math.sqrt(found.numel())


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise ConversionError(
            f"a model output of type {type(output).__name__} without logits",
            "logits [..., classes]",
            "use loss='output' for a model that predicts nothing",
        )
    return found
