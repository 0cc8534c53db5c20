"""Block-corrected compression: each block makes up for what it and the blocks before it have lost.

    inputs    what the compressed blocks before pass on
    targets   what the dense block makes of what the dense blocks before pass on
    error     Σ o ⊙ (output − target)² / Σ o ⊙ target²       o: second moments of the loss's gradient, one per feature

For every weight of a block in turn: the weights that are still dense are tuned to the targets ("tune"), the last of them
in closed form (``compensation``), the second moments of the weight's input are measured again, and it is factored ("factor").
At the end signs and scales of all weights of the block are refined together ("refine").

Batches that are held out judge: of each training that state is kept which has the least error on them, or the one before it.

Experts of a mixture take one turn together: none reads what another writes, and the cost of a turn grows with their number.

Source: targets, order and tuning of the authors' notebooks; fresh input moments and straight-through refinement as in
published replications of NanoQuant.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.moments import Moment, measuring
from dbf_compile.calibration.streams import Streams
from dbf_compile.compression.compensation import Residuals, best_correction, writes_output
from dbf_compile.compression.jobs import MEMBER, FactorJob, joined
from dbf_compile.compression.training import TrainableDoubleBinary, sign_confidence, train, trained_factors
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.linear import dense_bias, dense_linears, dense_weight, replace_all, swap_

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


@dataclass(frozen=True)
class BlockTask:
    """One block to compress.

    Args:
        name: of the block in the model.
        index: which block of the model it is.
        module: the dense block in float32, in evaluation mode; not changed.
        jobs: of its weights, in the order in which they are factored.
        streams: how the block is called.
        inputs: hidden states [batch, tokens, features] of every batch, from the compressed prefix.
        targets: what the block is to return, of every batch.
        held_out: the last batches, as many as this, are not trained with; they judge. 0: all do both.
    """

    name: str
    index: int
    module: nn.Module
    jobs: Sequence[FactorJob]
    streams: Streams
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    held_out: int = 0

    def path(self, layer: str) -> str:
        """Return the name of a layer inside the block."""
        return layer[len(self.name) + 1 :] if self.name else layer


@dataclass
class BlockResult:
    """What became of a block.

    Attributes:
        factors: of all its layers that are factored, by full name.
        errors: weighted error of every job, by its name, before refinement.
        seconds: time to factor every job, by its name.
        stages: what was done, with the error of the block before and after.
    """

    factors: dict[str, DoubleBinaryFactors]
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


class BlockState:
    """A block while it is being compressed: some of its layers dense, the others factored and trainable.

    Args:
        task: what to compress.
        generator: shuffles the batches of all training.
    """

    def __init__(self, task: BlockTask, generator: torch.Generator) -> None:
        self.task, self.generator = task, generator
        self.block = copy.deepcopy(task.module)
        self.trainable: dict[str, TrainableDoubleBinary] = {}
        self.weights = _output_moments(task.jobs, task.targets[0].shape[-1]).to(task.targets[0].device)
        self.targets = [task.streams.counted(batch, target) for batch, target in enumerate(task.targets)]
        self.judging = range(self.batches if task.held_out else 0, len(task.inputs))
        judged = (self.targets[batch].square() for batch in self.judging)
        self._power = max(sum(float((self.weights * power).sum()) for power in judged), 1e-30)

    @property
    def batches(self) -> int:
        """The number of batches to train with."""
        return len(self.task.inputs) - self.task.held_out

    def run(self, batch: int) -> Tensor:
        """Return the output of the block for one batch."""
        return self.task.streams.run(self.block, self.task.index, batch, self.task.inputs[batch])

    @torch.no_grad()
    def run_all(self) -> None:
        """Run the block on all batches to train with, for what looks on."""
        for batch in range(self.batches):
            self.run(batch)

    def loss(self, batch: int) -> Tensor:
        """Return the mean weighted squared error of one batch."""
        return self._squared_errors(batch).mean()

    @torch.no_grad()
    def error(self) -> float:
        """Return the weighted squared error of the batches that judge, relative to their targets."""
        return sum(float(self._squared_errors(batch).sum()) for batch in self.judging) / self._power

    def _squared_errors(self, batch: int) -> Tensor:
        output = self.task.streams.counted(batch, self.run(batch))
        return self.weights * (output - self.targets[batch]).square()


def compress_block(
    task: BlockTask, recipe: BlockRecipe, progress: Callable[[float], object] = lambda share: None
) -> BlockResult:
    """Factor the weights of one block, each with the others making up for its error.

    Args:
        task: the block, its jobs, inputs and targets.
        recipe: what to do.
        progress: called with the share that is done, 0 to 1.

    Returns:
        The factors, and what every stage gained.
    """
    state = BlockState(task, torch.Generator().manual_seed(recipe.factorizer.seed))
    result = BlockResult({})
    done = 0.0
    error = state.error()
    turns = _turns(state)
    total = max(1, recipe.tune * len(turns) + len(task.jobs) + recipe.refine)

    def advance(amount: float) -> None:
        nonlocal done
        done += amount
        progress(min(1.0, done / total))

    def finish_stage(stage: str, what: str, began: float, epochs: int | None = None) -> None:
        nonlocal error
        before, error = error, state.error()
        result.stages.append(
            {
                "stage": stage,
                "block": task.index,
                "what": what,
                "measure": "error of the block's output",
                "before": before,
                "after": error,
                "seconds": round(time.perf_counter() - began, 3),
                "epochs": epochs,
            }
        )

    for number, (what, jobs) in enumerate(turns.items()):
        if recipe.tune:
            began = time.perf_counter()
            left = [job for later in list(turns.values())[number:] for job in later]
            finish_stage("tune", what, began, tune(state, left, recipe.tune))
            advance(recipe.tune)
        began = time.perf_counter()
        result.errors |= factor(state, jobs, recipe.factorizer)
        seconds = (time.perf_counter() - began) / len(jobs)
        result.seconds |= {job.name: round(seconds, 3) for job in jobs}
        finish_stage("factor", what, began)
        advance(len(jobs))
    if recipe.refine:
        began = time.perf_counter()
        finish_stage(
            "refine", "all", began, refine(state, recipe.refine, partial(advance, 1 / state.batches))
        )
    result.factors = trained_factors(state.trainable)
    return result


def _turns(state: BlockState) -> dict[str, list[FactorJob]]:
    """Return which jobs are done together, by name: each alone, but for members of a list that some positions pass by."""
    task, families = state.task, dict[str, list[FactorJob]]()
    for job in task.jobs:
        family = joined([f"{task.name}.{MEMBER.sub('*', task.path(name))}" for name in job.names])
        families.setdefault(family, []).append(job)
    positions: Counter[str] = Counter()
    if len(families) < len(task.jobs):
        with _inputs_to(state, task.jobs, lambda name, x: positions.update({name: x.shape[:-1].numel()})):
            state.run_all()
    turns: dict[str, list[FactorJob]] = {}
    most = max(positions.values(), default=0)
    for family, jobs in families.items():
        if len(jobs) > 1 and any(positions[job.name] < most for job in jobs):
            turns |= {family: jobs}
        else:
            turns |= {job.name: [job] for job in jobs}
    first = {job.name: number for number, job in enumerate(task.jobs)}
    return dict(sorted(turns.items(), key=lambda turn: first[turn[1][0].name]))


def tune(state: BlockState, jobs: Sequence[FactorJob], epochs: int) -> int:
    """Train the weights that are still dense, those of ``jobs``, towards the targets; return how many epochs are kept."""
    kept = compensate(state, jobs[0]) if len(jobs) == 1 else None
    if kept is not None:
        return kept
    layers = dense_linears(state.block)
    weights = [_weight_parameter(layers[state.task.path(name)]) for job in jobs for name in job.names]
    judge = state.error if state.task.held_out else None  # by what it trains with, it would always gain
    return train([(weights, _DENSE_RATE)], state.loss, state.batches, epochs, state.generator, judge=judge)


def compensate(state: BlockState, job: FactorJob) -> int | None:
    """Let the last dense weight of a block make up for what was lost, in closed form.

    Returns:
        1, or 0 where nothing helped and the weight is as it was; None where the layer does not write the block's output.
    """
    weight = dense_weight(dense_linears(state.block)[state.task.path(job.names[0])]).detach()
    flowing: list[Tensor] = []

    def run(batch: int) -> tuple[Tensor | None, Tensor]:
        flowing.clear()
        output = state.run(batch)
        return (flowing[0] if flowing else None), output

    def residuals(batches: Iterable[int]) -> Residuals | None:
        counted = state.task.streams.counted
        runs = ((batch, *run(batch)) for batch in batches)
        return Residuals.of(
            (counted(b, x), state.targets[b] - counted(b, y)) for b, x, y in runs if x is not None
        )

    with torch.no_grad(), _inputs_to(state, [job], lambda _, x: flowing.append(x)):
        if len(job.names) > 1 or not writes_output(weight, partial(run, 0)):
            return None
        training = residuals(range(state.batches))
        assert training is not None
        judging = residuals(state.judging) if state.task.held_out else None
        correction = best_correction(training, judging, state.weights)
        if correction is not None:
            weight.add_(correction)
    return int(correction is not None)


def factor(state: BlockState, jobs: Sequence[FactorJob], config: FactorizerConfig) -> dict[str, float]:
    """Factor the weights of ``jobs`` as they are now, put the factors into the block, return the weighted error of each."""
    layers = dense_linears(state.block)
    importances = _with_fresh_inputs(state, jobs)
    errors: dict[str, float] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for job, importance in zip(jobs, importances, strict=True):
        paths = [state.task.path(name) for name in job.names]
        weights = tuple(dense_weight(layers[path]).detach() for path in paths)
        job = replace(job, weights=weights, importance=importance)
        factors = factorize(job.stacked, job.mid_features, importance, config)
        inner, outer = sign_confidence(job.stacked, factors, importance)
        owner = None
        for name, path, part, confidence in zip(
            job.names, paths, factors.split(job.rows), outer.split(job.rows), strict=True
        ):
            dense = layers[path]
            layer = TrainableDoubleBinary(part, (inner, confidence), dense_bias(dense), owner)
            owner = owner or layer
            state.trainable[name] = replacements[dense] = layer
        errors[job.name] = weighted_error(job.stacked, factors, importance)
    replace_all(state.block, replacements)
    return errors


def refine(state: BlockState, epochs: int, progress: Callable[[], object] = lambda: None) -> int:
    """Train signs and scales of all factored layers together; return how many epochs are kept: flips may do harm."""
    scales = [scale for layer in state.trainable.values() for scale in layer.scales]
    latents = [latent for layer in state.trainable.values() for latent in layer.latents]
    rates = [(scales, _SCALE_RATE), (latents, _LATENT_RATE)]
    return train(rates, state.loss, state.batches, epochs, state.generator, progress, state.error)


def factored_copy(dense: nn.Module, name: str, factors: Mapping[str, DoubleBinaryFactors]) -> nn.Module:
    """Return a copy of the block ``name`` in which ``factors``, by the full names of layers, replace dense layers."""
    prefix = f"{name}." if name else ""
    return swap_(copy.deepcopy(dense), {full.removeprefix(prefix): layer for full, layer in factors.items()})


def _weight_parameter(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _output_moments(jobs: Sequence[FactorJob], features: int) -> Tensor:
    """Return the weights [features] of a block's outputs, mean 1: the gradient moments of the layer that writes them."""
    for job in reversed(jobs):
        moment = job.importance.output_grad_second_moment if job.importance is not None else None
        if moment is not None and len(job.names) == 1 and job.out_features == features:
            weights = diagonal_of(moment).float()
            if bool(weights.any()):
                return weights / weights.mean()
    return torch.ones(features)


@torch.no_grad()
def _with_fresh_inputs(state: BlockState, jobs: Sequence[FactorJob]) -> list[Importance | None]:
    """Return the importances of ``jobs`` with the moments that their inputs have now, behind the compressed prefix.

    What nothing reaches, such as an expert that no token goes to, keeps the moments of the dense model.
    """
    moments: dict[str, Moment] = {}
    for job in jobs:
        dense_moment = None if job.importance is None else job.importance.input_second_moment
        if dense_moment is not None:
            moments[job.name] = Moment(whole=dense_moment.dim() == 2)
    mask: Tensor | None = None
    with _inputs_to(
        state, [job for job in jobs if job.name in moments], lambda name, x: moments[name].add(x, mask)
    ):
        whole = any(moment.whole for moment in moments.values())
        for batch in measuring(state.batches, whole) if moments else ():
            mask = state.task.streams.masks[batch]  # read above
            state.run(batch)
    importances: list[Importance | None] = []
    for job in jobs:
        moment = moments.get(job.name)
        fresh = moment.mean() if moment is not None and moment.positions else None
        if job.importance is None or fresh is None:
            importances.append(job.importance)
        else:
            importances.append(Importance(fresh.float(), job.importance.output_grad_second_moment))
    return importances


@contextmanager
def _inputs_to(
    state: BlockState, jobs: Sequence[FactorJob], receive: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call ``receive`` with the name of a job and what flows into its layers, whenever that happens."""
    layers = dense_linears(state.block)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            receive(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        layers[state.task.path(job.names[0])].register_forward_pre_hook(hook_of(job.name), with_kwargs=True)
        for job in jobs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
