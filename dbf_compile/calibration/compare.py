"""How far a compressed model is from the dense one, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import (
    attention_mask,
    call_model,
    first_tensor,
    is_causal,
    logits_of,
    predicted_ids,
    predicts_tokens,
    token_ids,
    with_decoder_inputs,
)
from dbf_compile.errors import ConversionError


def divergence(dense: Tensor, compressed: Tensor, batch: Any) -> Tensor:
    """Return KL(dense ‖ compressed) in nats at every position that is no padding, as a vector.

    Args:
        dense: logits of the dense model, floating point [batch, tokens, vocabulary].
        compressed: logits of the compressed model, the same shape.
        batch: its ``attention_mask``, where it has one, marks padding.
    """
    log_dense = torch.log_softmax(dense.float(), -1)
    log_compressed = torch.log_softmax(compressed.float(), -1)
    kl = (log_dense.exp() * (log_dense - log_compressed)).sum(-1)
    return _without_padding(kl, batch)


def agreement(dense: Tensor, compressed: Tensor, batch: Any) -> Tensor:
    """Return whether both models predict the same token, at every position that is no padding, as a vector of bool.

    Arguments as for :func:`divergence`.
    """
    return _without_padding(dense.argmax(-1) == compressed.argmax(-1), batch)


def _without_padding(values: Tensor, batch: Any) -> Tensor:
    mask = attention_mask(batch)
    return (
        values[mask.to(values.device)]
        if mask is not None and mask.shape == values.shape
        else values.flatten()
    )


@torch.no_grad()
def compare(dense: nn.Module | None, compressed: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    """Measure a compressed model on batches, and compare it with the dense model where there is one.

    Args:
        dense: the original model, or None.
        compressed: the model to judge.
        batches: as for ``calibrate``; windows of tokens for language models.

    Returns:
        "compressed", "dense": cross-entropy in nats a token, of causal language models. "perplexity": of the compressed
        model. "kl": mean KL(dense ‖ compressed) in nats, of models that predict tokens. "top1_agreement": share of
        positions where both predict the same token, 0 to 1. "error": relative squared error of the output, of other
        models. "measure": what was measured, and of how many predictions.

    Raises:
        ConversionError: the models predict tokens of different vocabularies.
    """
    sums: dict[str, float] = {}
    predictions = positions = 0
    causal, generates = is_causal(compressed), predicts_tokens(compressed)
    for batch in batches:
        batch = with_decoder_inputs(compressed, batch)
        output = call_model(compressed, batch)
        reference = None if dense is None else call_model(dense, batch)
        ids = token_ids(batch) if causal else predicted_ids(batch)
        if ids is None or not _predicts(output, ids):
            if reference is not None:
                _add_error(sums, first_tensor(reference), first_tensor(output))
            continue
        logits = logits_of(output)
        labels = _labels(batch, ids, causal) if generates else None
        if labels is not None:
            predictions += int((labels != -100).sum())
            _add(sums, "compressed", _nats(logits, labels))
        if reference is not None:
            target = logits_of(reference)
            _check_vocabularies(target, logits)
            kl = divergence(target, logits, batch)
            positions += kl.numel()
            _add(sums, "kl", float(kl.sum()))
            _add(sums, "top1_agreement", float(agreement(target, logits, batch).sum()))
            if labels is not None:
                _add(sums, "dense", _nats(target, labels))
    result: dict[str, Any] = {}
    if "power" in sums:
        result |= {"error": sums["lost"] / sums["power"], "measure": "relative squared error of the output"}
    if positions:
        result |= {name: sums[name] / positions for name in ("kl", "top1_agreement")}
        result["measure"] = f"{positions} predictions"
    if predictions:
        result |= {name: sums[name] / predictions for name in ("dense", "compressed") if name in sums}
        result["perplexity"] = math.exp(min(result["compressed"], 690.0))
        result["measure"] = f"nats a token, {predictions} predictions"
    return result


def _check_vocabularies(target: Tensor, logits: Tensor) -> None:
    if target.shape != logits.shape:
        raise ConversionError(
            f"a dense model with logits of {target.shape[-1]} tokens for one of {logits.shape[-1]}",
            "the model that was compressed",
            "name the dense model that this one was made from",
        )


def _add_error(sums: dict[str, float], target: Tensor | None, output: Tensor | None) -> None:
    if target is not None and output is not None:
        _add(sums, "lost", float((output.float() - target.float()).square().sum()))
        _add(sums, "power", float(target.float().square().sum()))


def _add(sums: dict[str, float], name: str, amount: float) -> None:
    sums[name] = sums.get(name, 0.0) + amount


def _predicts(output: Any, ids: Tensor) -> bool:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape


def _labels(batch: Any, ids: Tensor, causal: bool) -> Tensor | None:
    """Return the tokens that are to be predicted, -100 where there is none; None of a decoder whose batch has none."""
    if causal:
        mask = attention_mask(batch)
        if mask is not None and mask.shape == ids.shape:
            ids = ids.masked_fill(~mask.to(ids.device), -100)
        return nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    return batch["labels"] if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor) else None


def _nats(logits: Tensor, labels: Tensor) -> float:
    """Return the sum of the cross-entropies, in nats, of every label given what comes before it."""
    return float(
        nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum"
        )
    )
