"""Block-corrected compression: each block makes up for what it and the blocks before it have lost.

    inputs    what the compressed blocks before pass on
    targets   what the dense block makes of what the dense blocks before pass on
    error     Σ o ⊙ (output − target)² / Σ o ⊙ target²       o: second moments of the loss's gradient, one per feature

For every weight of a block in turn: the weights that are still dense are tuned to the targets ("tune"), the second moments
of the weight's input are measured again, and it is factored ("factor"). At the end signs and scales of all weights of the
block are refined together ("refine").

Source: targets, order and tuning of the authors' notebooks; fresh input moments and straight-through refinement as in
published replications of NanoQuant.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.moments import Moment
from dbf_compile.calibration.streams import Streams
from dbf_compile.compression.jobs import FactorJob
from dbf_compile.compression.training import TrainableDoubleBinary, sign_confidence, train, trained_factors
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.linear import dense_linears, dense_weight, replace_everywhere, swap_

# Rates of learning, in units of the root mean square of what is trained.
_DENSE_RATE, _SCALE_RATE, _LATENT_RATE = 0.01, 0.01, 0.02


@dataclass(frozen=True)
class BlockRecipe:
    """What is done to a block.

    Args:
        tune: epochs of tuning dense weights before each factorization; 0 leaves it out.
        refine: epochs of refining signs and scales at the end; 0 leaves it out.
        factorizer: settings of the factorizer.
    """

    tune: int
    refine: int
    factorizer: FactorizerConfig


@dataclass
class BlockResult:
    """What became of a block.

    Attributes:
        factors: of all its layers that are factored, by full name.
        errors: weighted error by the joined names of what was factored as one, before refinement.
        seconds: that took, the same.
        stages: what was done, with the error of the block before and after.
    """

    factors: dict[str, DoubleBinaryFactors]
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


def compress_block(
    name: str,
    index: int,
    dense: nn.Module,
    jobs: Sequence[FactorJob],
    streams: Streams,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    recipe: BlockRecipe,
    progress: Callable[[float], object] = lambda share: None,
) -> BlockResult:
    """Factor the weights of one block, each with the others making up for it.

    Args:
        name: of the block in the model.
        index: which block of the model it is.
        dense: the block in float32, in evaluation mode; not changed.
        jobs: of its weights, in the order in which they are to be factored.
        streams: how the block is called.
        inputs: hidden states of every batch in front of it, from the compressed prefix.
        targets: what is to come out, of every batch.
        recipe: what to do.
        progress: called with the share that is done, 0 to 1.

    Returns:
        Its factors, and what every step gained.
    """
    block = copy.deepcopy(dense)
    features = _output_moments(jobs, targets[0].shape[-1]).to(targets[0].device)
    wanted = [streams.counted(batch, target) for batch, target in enumerate(targets)]
    power = max(sum(float((features * target.square()).sum()) for target in wanted), 1e-30)
    generator = torch.Generator().manual_seed(recipe.factorizer.seed)
    result = BlockResult({})
    local = {full: _inside(name, full) for job in jobs for full in job.names}
    trained: dict[str, TrainableDoubleBinary] = {}
    steps = [recipe.tune + 1] * len(jobs) + [recipe.refine]
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done
        done += amount
        progress(min(1.0, done / max(1, sum(steps))))

    def run(batch: int) -> Tensor:
        return streams.run(block, index, batch, inputs[batch])

    def missed(batch: int) -> Tensor:
        return features * (streams.counted(batch, run(batch)) - wanted[batch]).square()

    def loss(batch: int) -> Tensor:
        return missed(batch).mean()

    @torch.no_grad()
    def error() -> float:
        return sum(float(missed(batch).sum()) for batch in range(len(inputs))) / power

    def stage(kind: str, what: str, before: float, began: float) -> float:
        after = error()
        result.stages.append(
            {
                "stage": kind,
                "block": index,
                "what": what,
                "measure": "error of the block's output",
                "before": before,
                "after": after,
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        return after

    lost = error()
    for number, job in enumerate(jobs):
        layers = dense_linears(block)
        remaining = [local[full] for later in jobs[number:] for full in later.names]
        if recipe.tune:
            began = time.perf_counter()
            weights = [parameter for path in remaining for parameter in _weights(layers[path])]
            train([(weights, _DENSE_RATE)], loss, len(inputs), recipe.tune, generator)
            lost = stage("tune", job.name, lost, began)
            advance(recipe.tune)
        began = time.perf_counter()
        paths = [local[full] for full in job.names]
        importance = _with_fresh_inputs(job.importance, layers[paths[0]], run, streams.masks)
        job = replace(
            job,
            weights=tuple(dense_weight(layers[path]).detach() for path in paths),
            importance=importance,
        )
        factors = factorize(job.stacked, job.mid_features, importance, recipe.factorizer)
        result.errors[job.name] = weighted_error(job.stacked, factors, importance)
        inner, outer = sign_confidence(job.stacked, factors, importance)
        rows = [weight.shape[0] for weight in job.weights]
        owner = None
        for full, part, sure in zip(job.names, factors.split(rows), outer.split(rows), strict=True):
            old = layers[local[full]]
            bias = old.bias if isinstance(old.bias, Tensor) else None
            trained[full] = TrainableDoubleBinary(part, (inner, sure), bias, owner)
            owner = owner or trained[full]
            replace_everywhere(block, old, trained[full])
        result.seconds[job.name] = round(time.perf_counter() - began, 3)
        lost = stage("factor", job.name, lost, began)
        advance(1)
    if recipe.refine:
        began = time.perf_counter()
        scales = [scale for layer in trained.values() for scale in layer.scales]
        latents = [latent for layer in trained.values() for latent in layer.latents]
        rates = [(scales, _SCALE_RATE), (latents, _LATENT_RATE)]
        before = [parameter.detach().clone() for parameter in (*scales, *latents)]
        train(rates, loss, len(inputs), recipe.refine, generator, partial(advance, 1 / len(inputs)))
        if error() > lost:  # flips may do harm where samples are few
            with torch.no_grad():
                for parameter, kept in zip((*scales, *latents), before, strict=True):
                    parameter.copy_(kept)
        stage("refine", "all", lost, began)
    result.factors = trained_factors(trained)
    return result


def factored_copy(dense: nn.Module, name: str, factors: Mapping[str, DoubleBinaryFactors]) -> nn.Module:
    """Return a copy of the block ``name`` with factored layers, given by their full names, in the place of dense ones."""
    return swap_(copy.deepcopy(dense), {_inside(name, full): made for full, made in factors.items()})


def _inside(block: str, layer: str) -> str:
    """Return the name of a layer inside of its block."""
    return layer[len(block) + 1 :] if block else layer


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return [weight]


def _output_moments(jobs: Sequence[FactorJob], features: int) -> Tensor:
    """Return how much each feature of a block's output counts, mean 1: as the outputs of the layer that writes last."""
    for job in reversed(jobs):
        moment = job.importance.output_grad_second_moment if job.importance is not None else None
        if moment is not None and len(job.names) == 1 and job.out_features == features:
            found = diagonal_of(moment).float()
            if bool(found.any()):
                return found / found.mean()
    return torch.ones(features)


@torch.no_grad()
def _with_fresh_inputs(
    importance: Importance | None,
    layer: nn.Module,
    run: Callable[[int], Tensor],
    masks: Sequence[Tensor | None],
) -> Importance | None:
    """Return ``importance`` with the second moments of what reaches ``layer`` now, on the compressed prefix."""
    known = None if importance is None else importance.input_second_moment
    if importance is None or known is None:
        return importance
    moment = Moment(whole=known.dim() == 2)
    mask: Tensor | None = None

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        moment.add(args[0], mask)

    handle = layer.register_forward_pre_hook(hook)
    try:
        for batch, mask in enumerate(masks):  # noqa: B007  the hook reads it
            run(batch)
    finally:
        handle.remove()
    fresh = moment.mean()
    if fresh is None or not moment.positions:
        return importance  # nothing reaches it: an expert that no token goes to
    return Importance(fresh.float(), importance.output_grad_second_moment)
