"""The compressed folder: written beside its place, with its report, and moved there whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from dbf_compile.compression.operations import count_operations
from dbf_compile.errors import CheckpointError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.files import write_text
from dbf_compile.progress import say
from dbf_compile.run.context import Plan, Run
from dbf_compile.run.page import write_report
from dbf_compile.run.report import (
    PAGE,
    REPORT,
    Bits,
    Coverage,
    DenseRow,
    Evaluation,
    LayerRow,
    OperationFacts,
    Report,
    StageRow,
    environment,
)
from dbf_compile.run.verification import differences


def write_folder(run: Run, plan: Plan, distilled: Mapping[str, Any] | None) -> None:
    """Write the compressed model and its report.

    Args:
        run: the compression; all factors are among its results.
        plan: what was factored.
        distilled: what distillation gained, or None where it was left out.
    """
    from dbf_compile.integrations import folder as model_folder

    request, fingerprint = run.request, run.request.fingerprint()
    student = run.student(run.all_factors(plan) if distilled is None else run.work.read("distilled")[0])
    evaluation = run.judge(student, plan.blocks) if distilled is None else distilled["after"]
    stored = sum(one.stored_bits for one in plan.placed)
    factored = stored / sum(one.job.size for one in plan.placed)
    folder = run.work.new_folder(request.output.name)
    try:
        compressed = model_folder.CompressedModel(
            model=request.model,
            layers=_layer_table(plan),
            factors=_FactorReader(run, plan, distilled is not None),
            bits_per_weight=factored,
            source=request.source.folder,
            tokenizer=request.tokenizer,
            tables=run.tables,
        )
        options = request.config
        size = model_folder.write_model(folder, compressed, options.max_shard_size, options.progress)
        report = Report(
            model=request.model_facts,
            data=request.data.facts(),
            fingerprint=fingerprint,
            settings=fingerprint["settings"],
            bits=Bits(
                factored=factored,
                target=request.config.bits_per_weight,
                file=8 * size / plan.coverage["weights"],
            ),
            coverage=_coverage(plan.coverage),
            layers=_layer_rows(run, plan),
            stages=_stage_rows(run, plan, distilled),
            evaluation=Evaluation.of(evaluation),
            operations=OperationFacts.of(count_operations(student).summary()),
            time=run.seconds,
            **environment(request.device),
        )
        content = json.dumps(report, indent=1)
        write_text(folder / REPORT, content + "\n")
        write_report(json.loads(content), folder / PAGE)  # checks what was written, before it takes its place
        say(f"verifying {request.output}", request.config.progress)
        with run.timed("verify"):
            _verify(run, plan, student, folder)
        folder.rename(request.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(run: Run, plan: Plan, student: nn.Module, folder: Path) -> None:
    """Load a folder as its users will, and compare it with the model that was judged.

    Raises:
        CheckpointError: it cannot be loaded, or is another model.
    """
    from dbf_compile.integrations import pretrained

    request = run.request
    loaded = pretrained.open_as(type(request.model), folder)
    batch = next(iter([*request.judging, *request.calibrating]), None)
    different = differences(student, loaded, batch, plan.blocks, request.device)
    if different is not None:
        raise CheckpointError(
            f"a folder for {request.output} that loads as another model than was judged ({different})",
            "the model that the report describes",
            f"nothing was written there, and {run.work.folder} is kept: report this with the class {type(student).__name__}",
        )


class _FactorReader:
    """Gives the factors of a layer; the last result that was read stays in memory."""

    def __init__(self, run: Run, plan: Plan, distilled: bool) -> None:
        self._results = {
            name: "distilled" if distilled else one.result for one in plan.placed for name in one.job.names
        }
        self._read = lru_cache(maxsize=1)(lambda result: run.work.read(result)[0])

    def __call__(self, layer: str) -> DoubleBinaryFactors:
        return self._read(self._results[layer])[layer]


def _layer_table(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return ``layers`` of the quantization config."""
    return {
        name: {
            "mid_features": one.job.mid_features,
            "shares_first_stage_with": None if name == one.job.names[0] else one.job.names[0],
        }
        for one in plan.placed
        for name in one.job.names
    }


def _coverage(covered: Mapping[str, Any]) -> Coverage:
    rows = tuple(DenseRow(**row) for row in covered["dense"])
    return Coverage(share=covered["share"], weights=covered["weights"], dense=rows)


def _facts(run: Run, plan: Plan) -> dict[str, Mapping[str, Any]]:
    return {name: run.work.read(name)[1] for name in plan.results}


def _layer_rows(run: Run, plan: Plan) -> tuple[LayerRow, ...]:
    facts = _facts(run, plan)
    return tuple(
        LayerRow(
            name=one.job.name,
            shape=(one.job.out_features, one.job.in_features),
            mid_features=one.job.mid_features,
            bits_per_weight=one.stored_bits / one.job.size,
            error=facts[one.result]["errors"][one.job.name],
            seconds=facts[one.result]["seconds"][one.job.name],
            block=one.block,
        )
        for one in plan.placed
    )


def _stage_rows(run: Run, plan: Plan, distilled: Mapping[str, Any] | None) -> tuple[StageRow, ...]:
    stages: Sequence[StageRow] = [
        StageRow(**stage) for facts in _facts(run, plan).values() for stage in facts["stages"]
    ]
    if distilled is None or "kl" not in distilled["after"]:
        return tuple(stages)
    distillation = StageRow(
        stage="distill",
        measure="KL from the dense model",
        before=distilled["before"]["kl"],
        after=distilled["after"]["kl"],
        seconds=distilled["seconds"],
        epochs=distilled["epochs"],
    )
    return (*stages, distillation)
