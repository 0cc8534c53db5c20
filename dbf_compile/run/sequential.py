"""Sequential mode: block after block, with inputs from the compressed prefix and targets from the dense model.

A model may have several stacks of blocks, such as an encoder and a decoder. They are compressed in the order in which the
model runs them. What a stack reads besides its own hidden states, such as the states of the encoder, comes from the
compressed model as well.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dbf_compile.calibration.offload import offloaded
from dbf_compile.calibration.streams import Streams, record, stacks_of
from dbf_compile.compression.blocks import BlockRecipe, BlockTask, compress_block, factored_copy
from dbf_compile.factors import DoubleBinaryFactors, move_factors
from dbf_compile.progress import over, say
from dbf_compile.run.context import Plan, Run
from dbf_compile.run.work import Result

_EPOCHS = 4
# On blocks of SmolLM2 with 64 windows, 2 epochs of refining left 0.01959 of the output's error on other text, 4 epochs 0.01956;
# 2 epochs of tuning 0.02270, 4 epochs 0.02268, 1 epoch 0.02296, none 0.02367.
TUNING_STEPS, REFINING_STEPS = 128, 128


def training_epochs(epochs: int | None, windows: int, steps: int) -> int:
    """Return the epochs of a training: those that are asked for, else 4 or the fewer that make so many steps."""
    return max(1, min(_EPOCHS, steps // max(1, windows))) if epochs is None else epochs


def stacks_to_factor(run: Run, blocks: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the stacks of a model by the names of their blocks; a warning names the blocks that belong to none."""
    model = run.request.model
    with offloaded(model, list(blocks.values()), run.request.device):
        say("looking at the order of the blocks", run.request.config.progress)
        stacks = stacks_of(model, blocks, run.request.calibrating)
    others = [name for name in blocks if not any(name in stack for stack in stacks)]
    if others or not stacks:
        which = (
            f"{len(others)} of {len(blocks)} blocks ({', '.join(others[:3])} …)" if blocks else "no blocks"
        )
        warnings.warn(
            f"{which}: the data does not pass one after the other. Their weights are factored as in mode 'independent'",
            stacklevel=6,
        )
    return stacks


def factor_sequential(run: Run, plan: Plan) -> None:
    """Factor block after block, each one result. One process does; the others wait and take over if it dies.

    Args:
        run: the compression; what lies in no stack is factored already.
        plan: the stacks, and the jobs inside them.
    """
    placed = [one for one in plan.placed if not one.alone]
    with run.work.exclusive("blocks"):
        if all(run.work.has(one.result) for one in placed):
            return
        with run.bar("blocks", sum(one.job.size for one in placed), "weight") as bar:
            for number, names in enumerate(plan.stacks):
                dense = _recorded(run, plan, run.request.model, names)
                compressed = (
                    dense if number == 0 else _recorded(run, plan, _student(run, plan, number), names)
                )
                _factor_stack(run, plan, names, (dense, compressed), bar)


def _student(run: Run, plan: Plan, stacks: int) -> nn.Module:
    """Return the model with the first ``stacks`` stacks, and all that lies in none, compressed."""
    later = {name for stack in plan.stacks[stacks:] for name in stack}
    factors: dict[str, DoubleBinaryFactors] = {}
    for result in plan.results:
        if result not in later:
            factors |= run.work.read(result)[0]
    return run.student(factors)


def _recorded(run: Run, plan: Plan, model: nn.Module, names: Sequence[str]) -> Streams:
    """Return what flows into the blocks ``names`` of ``model``."""
    blocks = [model.get_submodule(name) for name in plan.blocks]
    with offloaded(model, blocks, run.request.device):
        every = [*run.request.calibrating, *run.request.judging]
        batches = over(every, "recording", "batch", run.request.config.progress)
        return record(model, [model.get_submodule(name) for name in names], batches)


def _factor_stack(
    run: Run, plan: Plan, names: Sequence[str], recorded: tuple[Streams, Streams], bar: tqdm[Any]
) -> None:
    """Factor the blocks ``names``.

    Args:
        run, plan: the compression.
        names: of a stack.
        recorded: what flows into the stack in the dense model, and in the compressed one.
        bar: is moved.
    """
    request = run.request
    config, windows = request.config, len(request.calibrating)
    recipe = BlockRecipe(
        training_epochs(config.tune, windows, TUNING_STEPS),
        training_epochs(config.refine, windows, REFINING_STEPS),
        run.factorizer,
    )
    dense, compressed = (streams.hidden for streams in recorded)
    for index, name in enumerate(names):
        block = request.model.get_submodule(name)
        module = copy.deepcopy(block).to(request.device).float().requires_grad_(False).eval()
        jobs = [one.job for one in plan.placed if one.result == name]
        streams, compressed_streams = (stream.for_block(module, index) for stream in recorded)
        targets = streams.outputs(module, index, dense)
        factors: Mapping[str, DoubleBinaryFactors] = {}
        if jobs:
            held_out = len(request.judging)
            task = BlockTask(name, index, module, jobs, compressed_streams, compressed, targets, held_out)
            place = list(plan.blocks).index(name)
            before = bar.n
            factors = run.work.factors(name, _Block(task, recipe, place, bar))[0]
            # Blocks of an earlier run move the bar, too.
            bar.update(before + sum(job.size for job in jobs) - bar.n)
        compressed = compressed_streams.outputs(factored_copy(module, name, factors), index, compressed)
        dense = targets


class _Block:
    """Makes the result of one block when it is called, and moves the bar."""

    def __init__(self, task: BlockTask, recipe: BlockRecipe, place: int, bar: tqdm[Any]) -> None:
        self._task, self._recipe, self._place, self._bar = task, recipe, place, bar

    def __call__(self) -> Result:
        before, size = self._bar.n, sum(job.size for job in self._task.jobs)

        def show(share: float) -> None:
            self._bar.update(int(before + share * size) - self._bar.n)

        result = compress_block(self._task, self._recipe, show)
        stages = [{**stage, "block": self._place} for stage in result.stages]
        facts = {"errors": result.errors, "seconds": result.seconds, "stages": stages}
        return move_factors(result.factors, dict.fromkeys(result.factors, torch.device("cpu"))), facts
