"""``finetune``: from a compressed folder to another one of the same format and bits, nearer to the dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dbf_compile.calibration.compare import compare_kinds
from dbf_compile.calibration.model_io import to_device
from dbf_compile.errors import CheckpointError
from dbf_compile.factors import SIGN_NAMES, DoubleBinaryFactors
from dbf_compile.files import write_text
from dbf_compile.finetuning.learner import Learner
from dbf_compile.finetuning.ranks import Ranks, joined
from dbf_compile.finetuning.request import Request
from dbf_compile.finetuning.request import default_output as default_output
from dbf_compile.finetuning.student import training_dtype
from dbf_compile.finetuning.text import Text
from dbf_compile.finetuning.training import Course, Training
from dbf_compile.keywords import FinetuneKeywords
from dbf_compile.machine import all_cores, chosen_device
from dbf_compile.options import FinetuneConfig
from dbf_compile.progress import over, say
from dbf_compile.records import resolve
from dbf_compile.run.output import existing, work_folder
from dbf_compile.run.page import write_report
from dbf_compile.run.report import PAGE, REPORT, Evaluation, Report, StageRow
from dbf_compile.run.verification import differences
from dbf_compile.run.work import Work
from dbf_compile.signs import interleave


@dataclass(frozen=True)
class Finetuned:
    """What ``finetune`` made.

    Attributes:
        folder: the model that is nearer to the dense one: the new folder, or the one that it started from.
        improved: whether a new folder was written.
        before, after: distance from the dense model on text kept back, as of ``evaluate``.
        course: steps, flips and judgements on the way.
    """

    folder: Path
    improved: bool
    before: dict[str, Any]
    after: dict[str, Any]
    course: Course

    def __str__(self) -> str:
        change = f"KL from the dense model {self.before['kl']:.4f} -> {self.after['kl']:.4f}"
        if not self.improved:
            return f"{self.folder} stays as it was: no better state on text kept back ({change})"
        return f"{self.folder}: {change} on text kept back, {self.course.flips} signs flipped"


def finetune(
    folder: str | Path,
    data: Any = None,
    output: str | Path | None = None,
    *,
    dense: str | Path | None = None,
    tokenizer: Any = None,
    config: FinetuneConfig | None = None,
    **options: Unpack[FinetuneKeywords],
) -> Finetuned:
    """Train a compressed folder end to end: signs, scales and norms learn the dense model's predictions.

    Bits and file format stay. The result is never worse than the start: the best state on text kept back is written, and
    nothing is if none is better. A run that was stopped continues where it was, and ends with the same bits. Processes of
    torchrun or of ``accelerate launch`` share every step.

    Args:
        folder: as ``compress`` wrote it, or its name on the Hub.
        data: text that the model has not been calibrated with, as for ``token_batches``, or by kind of text. None: the dense
            model writes it (``own_text``).
        output: the folder to write. None: the name of ``folder`` with "-finetuned" behind it, beside ``folder``; in the current
            folder where that is a name on the Hub.
        dense: the dense model: folder, GGUF file or name on the Hub; None for the one that the folder's report names.
        tokenizer: for ``data``; None for that of the folder, or of the dense model where it has none.
        config: how to train.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        The folder, and its distance from the dense model before and after.

    Raises:
        OptionError, ConversionError: something was asked for that cannot be done.
        ResumeError: the work that is there belongs to other arguments.
        CheckpointError: files are damaged, or cannot be written.
        TrainingError: the loss is not finite.
    """
    settings = resolve(FinetuneConfig, config, options)
    from dbf_compile.integrations.bars import bars_of_transformers

    device = chosen_device(settings.device)
    with bars_of_transformers(settings.progress), joined(device) as ranks:
        settings = replace(settings, progress=settings.progress and ranks.rank == 0)
        request = Request.of((folder, output, dense), data, tokenizer, settings, device)
        ranks.wait()  # before any of them writes
        with all_cores() if ranks.size == 1 else nullcontext():
            try:
                return _finetuned(request, ranks)
            except OSError as error:
                raise CheckpointError(
                    f"{request.output}: {error}",
                    "a folder that can be written, with room for the model",
                    "make room, then run the same command again: what is done is kept",
                ) from error


def _finetuned(request: Request, ranks: Ranks) -> Finetuned:
    work = _work(request, ranks)
    with work.alone("finetune") if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0 and request.output.exists():  # since the request was checked
            raise existing(request.output)
        return _trained(request, ranks, work)


def _trained(request: Request, ranks: Ranks, work: Work) -> Finetuned:
    settings, output = request.config, request.output
    student = request.student()
    dtype = training_dtype(student, request.device)
    learner = Learner(student, request.teacher, settings, dtype, ranks)
    course = Training(learner, request.text, settings, work.folder, ranks).run()
    result = None
    if ranks.rank == 0:
        model = request.student()
        before = _distance(request, model, "before")
        put_(model, learner.factors(), learner.small())
        after = _distance(request, model, "after")
        improved = is_better(after, before)
        result = Finetuned(output if improved else request.folder, improved, before, after, course)
        if improved:
            _write(request, model, learner, result, work)
        work.remove()
    return ranks.broadcast(result)


def is_better(after: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Return whether a model is nearer to the dense one in the mean over the kinds of text, and in no kind farther from it."""
    kinds = before["kinds"]
    return bool(
        after["kl"] < before["kl"] and all(after["kinds"][kind]["kl"] <= kinds[kind]["kl"] for kind in kinds)
    )


def _work(request: Request, ranks: Ranks) -> Work:
    """Return the durable work of a run; the first process makes it."""
    folder = work_folder(request.output)
    fingerprint = request.fingerprint()
    work = Work(folder, fingerprint, request.config.resume) if ranks.rank == 0 else None
    ranks.wait()
    return work or Work(folder, fingerprint)


def _distance(request: Request, model: nn.Module, when: str) -> dict[str, Any]:
    """Return how far a model is from the dense one on the text kept back."""
    batches = {
        kind: (
            to_device({"input_ids": window[None].long()}, request.device)
            for window in over(windows, f"judging {kind} {when}", "window", request.config.progress)
        )
        for kind, windows in request.text.judging.items()
    }
    return compare_kinds(request.teacher_model, model, batches)


@torch.no_grad()
def put_(model: nn.Module, factors: Mapping[str, DoubleBinaryFactors], small: Mapping[str, Tensor]) -> None:
    """Give a compressed model other factors of the same sizes, norms and biases, in place."""
    for name, tensor in _tensors(factors, small).items():
        model.get_parameter(name).copy_(tensor)


def _tensors(factors: Mapping[str, DoubleBinaryFactors], small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names that they have in a model."""
    return {
        **small,
        **{
            f"{layer}.{name}": interleave(tensor) if name in SIGN_NAMES else tensor
            for layer, one in factors.items()
            for name, tensor in one.tensors().items()
        },
    }


def _write(request: Request, model: nn.Module, learner: Learner, result: Finetuned, work: Work) -> None:
    """Write the folder, and compare what it loads as with the model that was judged."""
    from dbf_compile.integrations import pretrained, rewriting

    output = request.output
    folder = work.new_folder(output.name)
    tensors = _tensors(learner.factors(), learner.small())
    rewriting.rewrite_model(request.folder, folder, model, tensors)
    if request.report is not None:
        _write_report(request.report, folder, result, request.text)
    say(f"verifying {output}", request.config.progress)
    loaded = pretrained.open_any(folder, request.config.trust_remote_code).to(request.device)
    batch = {"input_ids": next(iter(request.text.judging.values()))[:1].long()}
    different = differences(model, loaded, batch, device=request.device)
    if different is not None:
        raise CheckpointError(
            f"a folder for {output} that loads as another model than was judged ({different})",
            "the model that was trained",
            f"nothing was written there: report this with the class {type(model).__name__}",
        )
    folder.rename(output)


def _write_report(report: Report, folder: Path, result: Finetuned, text: Text) -> None:
    """Write what the stage gained, and from what, into the report of a folder, and draw its page anew."""
    course = result.course
    learned = f"{text.learning.numel()} tokens of {', '.join(text.judging)}"
    stage = StageRow(
        stage="finetune",
        what=f"{course.flips} signs flipped in {course.steps} steps on {learned}",
        measure="KL from the dense model",
        before=result.before["kl"],
        after=result.after["kl"],
        seconds=round(course.seconds, 3),
    )
    report = replace(report, stages=(*(report.stages or ()), stage), evaluation=Evaluation.of(result.after))
    content = json.dumps(report, indent=1)
    write_text(folder / REPORT, content + "\n")
    write_report(json.loads(content), folder / PAGE)
