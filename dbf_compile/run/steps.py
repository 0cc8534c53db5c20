"""The steps of one compression, in their order.

    own text       that the model writes itself          <output>.work/text-<row>.safetensors
    statistics     second moments of all layers          <output>.work/importance.safetensors
    allocation     a middle dimension for every weight   <output>.work/allocation.json
    factors        of every weight, or of every block    <output>.work/<name>.safetensors
    distillation   of all scales                         <output>.work/distilled.safetensors
    the folder     written beside, moved into place      <output>

Every step is a result of :class:`~dbf_compile.run.work.Work`: made once, by whichever process comes first, and read by all
others and by a run that continues after a crash.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.calibration.model_io import check_reads_tokens, computes_narrowly, predicts_tokens
from dbf_compile.calibration.moments import measuring
from dbf_compile.calibration.offload import blocks_of
from dbf_compile.calibration.statistics import load_importance, save_importance
from dbf_compile.compression.coverage import coverage, left_dense_share
from dbf_compile.compression.curves import allocate
from dbf_compile.compression.distillation import DistillRecipe, distill
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.errors import ConversionError
from dbf_compile.factorizer.importance import Importance
from dbf_compile.files import write_text
from dbf_compile.machine import narrow_products
from dbf_compile.progress import over
from dbf_compile.run.context import PlacedJob, Plan, Run
from dbf_compile.run.folder import write_folder
from dbf_compile.run.independent import factor_independent
from dbf_compile.run.sequential import factor_sequential, stacks_to_factor, training_epochs
from dbf_compile.run.work import Result

_LEAST_SHARE = 0.5  # of the weights, below which a user should know
DISTILLING_STEPS = 128


def run_steps(run: Run) -> None:
    """Make what is missing, and the folder."""
    output = run.request.output
    with run.work.exclusive("output"):
        if output.exists():
            return  # another worker was faster
    began = time.perf_counter()
    with run.timed("write"):
        run.write_own_text()
    with run.timed("calibrate"):
        importance = _statistics(run)
    with run.timed("allocate"):
        allocation = _allocation(run, importance)
    plan = _plan(run, importance, allocation)
    with run.timed("factor"):
        factor_independent(run, [one for one in plan.placed if one.alone])
        if plan.stacks:
            factor_sequential(run, plan)
    with run.timed("distill"):
        distilled = _distilled(run, plan)
    with run.work.exclusive("output"):
        if not output.exists():
            run.seconds["total"] = time.perf_counter() - began
            write_folder(run, plan, distilled)


def _statistics(run: Run) -> dict[str, Importance]:
    request = run.request
    config, model = request.config, request.model

    def make(path: Path) -> None:
        batches = request.calibrating or None
        if batches is not None and config.mode == "sequential":
            # Inputs are measured again, block by block.
            batches = [batches[place] for place in measuring(len(batches), config.curvature != "diagonal")]
        try:
            if batches is None:
                check_reads_tokens(model)
            # On SmolLM2 it moves moments of inputs by 0.03 % (the median of its layers) and those of gradients by 1.2 %.
            narrow = batches is not None and computes_narrowly(model, batches[0], request.device)
            with narrow_products(request.device) if narrow else nullcontext():
                importance = calibrate(
                    model,
                    batches,
                    curvature=config.curvature,
                    device=request.device,
                    seed=config.seed,
                    progress=config.progress,
                )
        except ConversionError as error:
            if batches is not None:
                raise
            warnings.warn(f"nothing is calibrated, and all features count alike: {error}", stacklevel=6)
            importance = {}
        if config.temper is not None:
            items = over(importance.items(), "tempering", "layer", config.progress, delay=1.0)
            importance = {name: item.tempered(config.temper) for name, item in items}
        save_importance(importance, path)

    return load_importance(run.work.once("importance.safetensors", make))


def _allocation(run: Run, importance: Mapping[str, Importance]) -> Mapping[str, int] | None:
    request = run.request
    if request.config.budget == "equal":
        return None

    def make(path: Path) -> None:
        batches, device = request.calibrating, request.device
        allocation = allocate(
            request.model, importance, batches=batches, device=device, config=request.config
        )
        write_text(path, json.dumps(dict(allocation.mid_features)))

    return dict(json.loads(run.work.once("allocation.json", make).read_text()))


def _plan(run: Run, importance: Mapping[str, Importance], allocation: Mapping[str, int] | None) -> Plan:
    model, config = run.request.model, run.request.config
    jobs = LayerFactorizer(config, importance, allocation=allocation).jobs(model)
    covered = coverage(model, {name for job in jobs for name in job.names}, config)
    if left_dense_share(covered) > 1 - _LEAST_SHARE:
        largest = ", ".join(f"{row['name']} ({row['reason']})" for row in covered["dense"][:3])
        warnings.warn(
            f"only {covered['share']:.0%} of the weights are factored; the largest others: {largest}",
            stacklevel=5,
        )
    blocks = blocks_of(model, [job.names[0] for job in jobs])
    stacks = stacks_to_factor(run, blocks) if config.mode == "sequential" else []
    in_turn = {name for stack in stacks for name in stack}
    return Plan(blocks, stacks, [PlacedJob.of(job, blocks, in_turn) for job in jobs], covered)


def _distilled(run: Run, plan: Plan) -> dict[str, Any] | None:
    """Return what distillation gained, or None where it is left out; its factors are the result "distilled"."""
    request = run.request
    epochs = training_epochs(request.config.distill, len(request.calibrating), DISTILLING_STEPS)
    if not (epochs and request.calibrating and predicts_tokens(request.model)):
        return None

    def make() -> Result:
        began = time.perf_counter()
        student = run.student(run.all_factors(plan))
        before = run.judge(student, plan.blocks)
        config, batches = request.config, request.calibrating
        recipe = DistillRecipe(epochs, config.seed, request.device)
        with (
            run.offloaded(student, plan.blocks),
            run.bar("distilling", epochs * len(batches), "step") as bar,
        ):
            factors, kept = distill(
                request.model, student, batches, request.judging, recipe, lambda: bar.update(1)
            )
        after = run.judge(run.student(factors), plan.blocks)
        seconds = round(time.perf_counter() - began, 3)
        return factors, {"before": before, "after": after, "seconds": seconds, "epochs": kept}

    return run.work.factors("distilled", make)[1]
