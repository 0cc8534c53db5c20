"""How far a compressed model is from the dense one, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dbf_compile.calibration.model_io import (
    call_model,
    first_tensor,
    is_causal,
    logits_of,
    next_tokens,
    output_mask,
    predicted_ids,
    predicts_tokens,
    token_ids,
    with_decoder_inputs,
)
from dbf_compile.errors import ConversionError

_AT_A_TIME = 2**19  # logits: they stay in the cache, and their memory is used again
# The divergence comes first: text that a model predicts badly says little by its cross-entropy.
MEASURES = ("kl", "nats_lost", "top1_agreement", "dense", "compressed", "error")


def divergence(dense: Tensor, compressed: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return KL(dense ‖ compressed) in nats at every position that counts, as a vector.

    Its gradient goes to ``compressed`` alone.

    Args:
        dense: logits of the dense model, floating point [batch, tokens, vocabulary].
        compressed: logits of the compressed model, the same shape.
        mask: positions that count, bool [batch, tokens]; None for all.
    """
    kl: Tensor = _Divergence.apply(compressed, dense)  # type: ignore[no-untyped-call]
    return _counting(kl, mask)


class _Divergence(torch.autograd.Function):
    """KL of rows of logits: a few rows at a time, and their gradient ``softmax(compressed) − softmax(dense)`` in the same pass.

    Autograd would keep five tensors of the size of the logits, which take gigabytes for a long window.
    """

    @staticmethod
    def forward(ctx: Any, compressed: Tensor, dense: Tensor) -> Tensor:
        rows = max(1, _AT_A_TIME // dense.shape[-1])
        pairs = zip(dense.flatten(0, -2).split(rows), compressed.flatten(0, -2).split(rows), strict=True)
        plain = torch.contiguous_format  # of logits that lie in another order, too
        gradient = torch.empty_like(compressed, memory_format=plain) if ctx.needs_input_grad[0] else None
        gradients = None if gradient is None else gradient.view(-1, gradient.shape[-1]).split(rows)
        kl: list[Tensor] = []
        for index, (one, other) in enumerate(pairs):
            log_dense, log_compressed = (torch.log_softmax(part.float(), -1) for part in (one, other))
            chances = log_dense.exp()
            kl.append((log_dense.sub_(log_compressed).mul_(chances)).sum(-1))
            if gradients is not None:
                gradients[index].copy_(log_compressed.exp_().sub_(chances))
        ctx.save_for_backward(gradient)
        return torch.cat(kl).view(dense.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None].to(gradient.dtype), None


def agreement(dense: Tensor, compressed: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return whether both models predict the same token, at every position that counts, as a vector of bool.

    Arguments as for :func:`divergence`.
    """
    return _counting(dense.argmax(-1) == compressed.argmax(-1), mask)


def squared_error(dense: Tensor, output: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """Return ``‖output − dense‖²`` and ``‖dense‖²`` over all positions that count.

    Args:
        dense: output of the dense model, floating point; [batch, tokens, features], or of any shape where all count.
        output: of the compressed model, the same shape.
        mask: positions that count, bool [batch, tokens]; None for all.
    """
    exact, near = dense.double(), output.double()
    if mask is not None and dense.dim() == 3 and mask.shape == dense.shape[:2]:
        exact, near = exact[mask.to(exact.device)], near[mask.to(near.device)]
    return float((near - exact).square().sum()), float(exact.square().sum())


def _counting(values: Tensor, mask: Tensor | None) -> Tensor:
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
        "kl": mean KL(dense ‖ compressed) in nats, of models that predict tokens. "nats_lost": what the compressed model's
        cross-entropy is above the dense one's, nats a token. "top1_agreement": share of positions where both predict the same
        token, 0 to 1. "compressed", "dense": cross-entropy in nats a token, of causal language models. "perplexity": of the
        compressed model. "error": relative squared error of the output, of other models. "measure": what was measured, and of
        how many predictions.

    Raises:
        ConversionError: the models predict tokens of different vocabularies.
    """
    sums = _Sums()
    causal, generates = is_causal(compressed), predicts_tokens(compressed)
    for batch in batches:
        batch = with_decoder_inputs(compressed, batch)
        output = call_model(compressed, batch)
        reference = None if dense is None else call_model(dense, batch)
        ids = token_ids(batch) if causal else predicted_ids(batch)
        mask = output_mask(compressed, batch)
        if ids is None or not _predicts(output, ids):
            if reference is not None:
                sums.add_error(first_tensor(reference), first_tensor(output), mask)
            continue
        logits = logits_of(output)
        target = None if reference is None else logits_of(reference)
        if target is not None:
            _check_vocabularies(target, logits)
        sums.add_predictions(target, logits, _labels(batch, ids, causal) if generates else None, mask)
    return sums.result()


def compare_kinds(
    dense: nn.Module | None, compressed: nn.Module, batches: Mapping[str, Iterable[Any]]
) -> dict[str, Any]:
    """Measure a compressed model on several kinds of text, as :func:`compare` does on one.

    Args:
        dense, compressed: as for :func:`compare`.
        batches: of each kind, by its name.

    Returns:
        "kinds": what :func:`compare` gives, by kind. Beside it, under the same names, the means over the kinds, each of which
        counts alike, and "worst_kind": the one with the largest divergence, or cross-entropy, or error. Kinds without batches
        are left out.
    """
    kinds = {kind: compare(dense, compressed, part) for kind, part in batches.items()}
    kinds = {kind: measured for kind, measured in kinds.items() if measured}
    if not kinds:
        return {}
    every = list(kinds.values())
    names = [name for name in MEASURES if all(name in measured for measured in every)]
    result: dict[str, Any] = {name: fmean(measured[name] for measured in every) for name in names}
    if "compressed" in result:
        result["perplexity"] = _perplexity(result["compressed"])
    result["measure"] = f"mean of {len(kinds)} kinds of text" if len(kinds) > 1 else every[0]["measure"]
    judge = next((name for name in ("kl", "compressed", "error") if name in names), None)
    if judge is not None:
        result["worst_kind"] = max(kinds, key=lambda kind: float(kinds[kind][judge]))
    return {**result, "kinds": kinds}


class _Sums:
    """Sums over positions, and what follows from them."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._predictions = self._positions = 0

    def add_predictions(
        self, target: Tensor | None, logits: Tensor, labels: Tensor | None, mask: Tensor | None
    ) -> None:
        """Add the logits [batch, tokens, vocabulary] of a batch, and those of the dense model."""
        if labels is not None:
            self._predictions += int((labels != -100).sum())
            self._add("compressed", _nats(logits, labels))
        if target is None:
            return
        kl = divergence(target, logits, mask)
        self._positions += kl.numel()
        self._add("kl", float(kl.sum()))
        self._add("top1_agreement", float(agreement(target, logits, mask).sum()))
        if labels is not None:
            self._add("dense", _nats(target, labels))

    def add_error(self, target: Tensor | None, output: Tensor | None, mask: Tensor | None) -> None:
        """Add the squared error of an output that is no prediction of tokens."""
        if target is not None and output is not None:
            lost, power = squared_error(target, output, mask)
            self._add("lost", lost)
            self._add("power", power)

    def result(self) -> dict[str, Any]:
        """Return what :func:`compare` does."""
        sums = self._sums
        result: dict[str, Any] = {}
        if sums.get("power"):  # else all positions were padding
            result = {
                "error": sums["lost"] / sums["power"],
                "measure": "relative squared error of the output",
            }
        if self._positions:
            result |= {name: sums[name] / self._positions for name in ("kl", "top1_agreement")}
            result["measure"] = f"{self._positions} predictions"
        if self._predictions:
            result |= {
                name: sums[name] / self._predictions for name in ("dense", "compressed") if name in sums
            }
            if "dense" in result:
                result["nats_lost"] = result["compressed"] - result["dense"]
            result["perplexity"] = _perplexity(result["compressed"])
            result["measure"] = f"nats a token, {self._predictions} predictions"
        return {name: result[name] for name in (*MEASURES, "perplexity", "measure") if name in result}

    def _add(self, name: str, amount: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + amount


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 690.0))


def _check_vocabularies(target: Tensor, logits: Tensor) -> None:
    if target.shape != logits.shape:
        raise ConversionError(
            f"a dense model with logits of {target.shape[-1]} tokens for one of {logits.shape[-1]}",
            "the model that was compressed",
            "name the dense model that this one was made from",
        )


def _predicts(output: Any, ids: Tensor) -> bool:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape


def _labels(batch: Any, ids: Tensor, causal: bool) -> Tensor | None:
    """Return the tokens that are to be predicted, -100 where there is none; None of a decoder whose batch has none."""
    if causal:
        return next_tokens(ids, batch)
    return batch["labels"] if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor) else None


def _nats(logits: Tensor, labels: Tensor) -> float:
    """Return the sum of the cross-entropies, in nats, of every label given what comes before it."""
    return float(
        nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum"
        )
    )
