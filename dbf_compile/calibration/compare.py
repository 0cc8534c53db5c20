"""How far a compressed model is from the dense one, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import (
    attention_mask,
    call_model,
    first_tensor,
    is_causal,
    logits_of,
    token_ids,
)


def divergence(wanted: Tensor, found: Tensor, batch: Any) -> Tensor:
    """Return KL(wanted ‖ found) in nats of every position that is no padding, as a vector."""
    log_wanted = torch.log_softmax(wanted.float(), -1)
    log_found = torch.log_softmax(found.float(), -1)
    lost = (log_wanted.exp() * (log_wanted - log_found)).sum(-1)
    return _kept(lost, batch)


def agreement(wanted: Tensor, found: Tensor, batch: Any) -> Tensor:
    """Return whether both predict the same, at every position that is no padding, as a vector."""
    return _kept(wanted.argmax(-1) == found.argmax(-1), batch)


def _kept(values: Tensor, batch: Any) -> Tensor:
    mask = attention_mask(batch)
    return (
        values[mask.to(values.device)]
        if mask is not None and mask.shape == values.shape
        else values.flatten()
    )


@torch.no_grad()
def compare(dense: nn.Module | None, compressed: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    """Measure a compressed model on batches, beside the dense one where there is one.

    Args:
        dense: the original, or None.
        compressed: the model to judge.
        batches: as for ``calibrate``; windows of tokens for language models.

    Returns:
        Of causal language models "compressed" and "dense", in nats a token, and "perplexity", of the compressed one;
        of all that predict tokens "kl", from the dense to the compressed prediction in nats, and "top1_agreement"; of
        others "error", the relative squared error of the output. "measure" says what of, and of how many predictions.
    """
    sums: dict[str, float] = {}
    predictions = positions = 0
    causal = is_causal(compressed)
    for batch in batches:
        found = call_model(compressed, batch)
        wanted = None if dense is None else call_model(dense, batch)
        ids = token_ids(batch)
        if ids is None or not _predicts(found, ids):
            if wanted is not None:
                _add_error(sums, first_tensor(wanted), first_tensor(found))
            continue
        logits = logits_of(found)
        if causal:
            predictions += ids.shape[0] * (ids.shape[1] - 1)
            _add(sums, "compressed", _nats(logits, ids))
        if wanted is not None:
            target = logits_of(wanted)
            apart = divergence(target, logits, batch)
            positions += apart.numel()
            _add(sums, "kl", float(apart.sum()))
            _add(sums, "top1_agreement", float(agreement(target, logits, batch).sum()))
            if causal:
                _add(sums, "dense", _nats(target, ids))
    result: dict[str, Any] = {}
    if "power" in sums:
        result |= {"error": sums["lost"] / sums["power"], "measure": "relative squared error of the output"}
    if positions:
        result |= {name: sums[name] / positions for name in ("kl", "top1_agreement")}
        result["measure"] = f"{positions} predictions"
    if predictions:
        result |= {name: sums[name] / predictions for name in ("dense", "compressed") if name in sums}
        result["perplexity"] = math.exp(min(result["compressed"], 700.0))
        result["measure"] = f"nats a token, {predictions} predictions"
    return result


def _add_error(sums: dict[str, float], target: Tensor | None, found: Tensor | None) -> None:
    if target is not None and found is not None:
        _add(sums, "lost", float((found.float() - target.float()).square().sum()))
        _add(sums, "power", float(target.float().square().sum()))


def _add(sums: dict[str, float], name: str, amount: float) -> None:
    sums[name] = sums.get(name, 0.0) + amount


def _predicts(output: Any, ids: Tensor) -> bool:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape


def _nats(logits: Tensor, ids: Tensor) -> float:
    """Return the summed cross-entropy of every token given those before it."""
    return float(
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device), reduction="sum"
        )
    )
