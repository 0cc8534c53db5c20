"""Sequential mode: block after block, with inputs from the compressed prefix and targets from the dense model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dbf_compile.calibration.offload import offloaded
from dbf_compile.calibration.streams import record
from dbf_compile.compression.blocks import BlockRecipe, BlockTask, compress_block, factored_copy
from dbf_compile.factors import DoubleBinaryFactors, move_factors
from dbf_compile.run.context import PlacedJob, Run
from dbf_compile.run.work import Result


def factor_sequential(run: Run, blocks: Mapping[str, nn.Module], placed: Sequence[PlacedJob]) -> None:
    """Factor block after block, each one result. One process does; the others wait and take over if it dies.

    Args:
        run: the compression.
        blocks: the blocks of the model by name, in order.
        placed: the jobs inside the blocks.
    """
    request, work = run.request, run.work
    jobs = {name: [one.job for one in placed if one.result == name] for name in blocks}
    recipe = BlockRecipe(request.config.tune, request.config.refine, run.factorizer)
    with work.exclusive("blocks"):
        if all(work.has(one.result) for one in placed):
            return
        with offloaded(request.model, list(blocks.values()), request.device):
            streams = record(request.model, list(blocks.values()), request.calibrating)
        dense = compressed = streams.hidden
        with run.bar("blocks", sum(one.job.size for one in placed), "weight") as bar:
            for index, (name, block) in enumerate(blocks.items()):
                module = copy.deepcopy(block).to(request.device).float().requires_grad_(False).eval()
                targets = streams.outputs(module, index, dense)
                factors: Mapping[str, DoubleBinaryFactors] = {}
                if jobs[name]:
                    task = BlockTask(name, index, module, jobs[name], streams, compressed, targets)
                    factors = work.factors(name, _Block(task, recipe, bar))[0]
                compressed = streams.outputs(factored_copy(module, name, factors), index, compressed)
                dense = targets


class _Block:
    """Makes the result of one block when it is called, and moves the bar."""

    def __init__(self, task: BlockTask, recipe: BlockRecipe, bar: tqdm[Any]) -> None:
        self._task, self._recipe, self._bar = task, recipe, bar

    def __call__(self) -> Result:
        before, size = self._bar.n, sum(job.size for job in self._task.jobs)

        def show(share: float) -> None:
            self._bar.update(int(before + share * size) - self._bar.n)

        result = compress_block(self._task, self._recipe, show)
        facts = {"errors": result.errors, "seconds": result.seconds, "stages": result.stages}
        return move_factors(result.factors, dict.fromkeys(result.factors, torch.device("cpu"))), facts
