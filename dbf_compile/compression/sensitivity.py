"""How much a model's predictions suffer when one weight alone is factored: measured, weight after weight.

    loss of a weight  =  E_t KL(p_t ‖ p̂_t)        p: of the dense model, p̂: with Ŵ in place of that weight, all others dense

Of models that do not predict tokens it is the relative squared error of the output. Budgets take the losses of weights to add up.

Members of a list, such as experts, are replaced together: there may be thousands, and few tokens reach each. They share the
loss by the second-order estimates of each.

Source: measuring the divergence that each layer causes is what quantizers with mixed bits do (exllamav2's ``measurement``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.compare import divergence, squared_error
from dbf_compile.calibration.model_io import (
    call_model,
    computes_narrowly,
    first_tensor,
    logits_of,
    output_mask,
    predicts_tokens,
    to_device,
)
from dbf_compile.calibration.offload import blocks_of, in_evaluation, offloaded, without_kv_cache
from dbf_compile.compression.jobs import MEMBER, FactorJob
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.linear import dense_linears
from dbf_compile.machine import narrow_products
from dbf_compile.progress import bar

_WINDOWS = 6  # kinds of text take turns, so that this is one of each
_LONG = 4  # a list of so few members may be layers one after the other
_KEPT = 2**28  # numbers of the dense model's output


def measured_losses(
    model: nn.Module,
    jobs: Sequence[FactorJob],
    factors_of: Callable[[FactorJob], DoubleBinaryFactors],
    batches: Sequence[Any],
    shares: Mapping[str, float],
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Return the loss of every weight when it alone is factored.

    Args:
        model: dense; it is as before at the end.
        jobs: the weights.
        factors_of: returns the factors that stand for a weight.
        batches: as for ``calibrate``; the first few are read.
        shares: what parts of the loss of a family its members have; any numbers of 0 or more by name.
        device: where to compute; None for where the model is.
        progress: show it.

    Returns:
        Losses by name, 0 or more: nats a token, or relative squared errors.
    """
    layers = dense_linears(model)
    places = [name for job in jobs for name in job.names]
    own = next(model.parameters()).device if device is None else torch.device(device)
    families = _families(jobs)
    losses: dict[str, float] = {}
    with (
        bar("measuring losses", len(families), "weight", progress) as moving,
        torch.no_grad(),
        without_kv_cache(model),
        in_evaluation(model),
    ):
        narrow = computes_narrowly(model, batches[0], own)
        with (
            narrow_products(own) if narrow else nullcontext(),
            offloaded(model, list(blocks_of(model, places).values()), device),
        ):
            judge = _Judge(model, batches, own)
            for members in families:
                with _in_place(layers, [(job, factors_of(job)) for job in members]):
                    loss = judge.loss()
                total = sum(shares[job.name] for job in members)
                for job in members:
                    losses[job.name] = loss * (shares[job.name] / total if total > 0 else 1 / len(members))
                moving.update(1)
    return losses


def _families(jobs: Sequence[FactorJob]) -> list[list[FactorJob]]:
    """Return which weights are measured together: each alone, but for long lists of a block."""
    together: dict[str, list[FactorJob]] = {}
    for job in jobs:
        layer = job.names[0]
        block = MEMBER.search(layer)
        end = block.end() if block else 0
        together.setdefault(layer[:end] + MEMBER.sub("*", layer[end:]), []).append(job)
    return [
        part
        for members in together.values()
        for part in ([members] if len(members) > _LONG else [[job] for job in members])
    ]


class _Judge:
    """Compares the model, as it is, with what it predicted when the judge was made."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], device: torch.device) -> None:
        self._model, self._predicts = model, predicts_tokens(model)
        self._batches: list[Any] = []
        self._dense: list[Tensor] = []
        for batch in islice(batches, _WINDOWS):
            batch = to_device(batch, device)
            output = self._output(batch)
            if self._dense and (len(self._dense) + 1) * output.numel() > _KEPT:
                break
            self._batches.append(batch)
            self._dense.append(output)

    def loss(self) -> float:
        """Return the mean divergence in nats, or the relative squared error."""
        lost = base = 0.0
        for batch, dense in zip(self._batches, self._dense, strict=True):
            output = self._output(batch)
            if self._predicts:
                each = divergence(dense, output, output_mask(self._model, batch))
                lost, base = lost + float(each.double().sum()), base + each.numel()
            else:
                error, power = squared_error(dense, output, output_mask(self._model, batch))
                lost, base = lost + error, base + power
        return max(0.0, lost / base) if base else 0.0

    def _output(self, batch: Any) -> Tensor:
        output = call_model(self._model, batch)
        if self._predicts:
            return logits_of(output)
        first = first_tensor(output)
        assert first is not None
        return first


@contextmanager
def _in_place(
    layers: Mapping[str, nn.Module], factored: Sequence[tuple[FactorJob, DoubleBinaryFactors]]
) -> Iterator[None]:
    """Let layers compute with what factors stand for; afterwards they have their own parameters again."""
    own: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for job, factors in factored:
            for name, part in zip(job.names, factors.dense().split(job.rows), strict=True):
                weight = layers[name].weight
                assert isinstance(weight, nn.Parameter)
                own.append((layers[name], weight))
                # Conv1D keeps its weight the other way round.
                stored = part if isinstance(layers[name], nn.Linear) else part.mT
                stored = stored.to(weight.device, weight.dtype)
                layers[name].weight = nn.Parameter(stored, requires_grad=False)
        yield
    finally:
        for layer, weight in own:
            layer.weight = weight
