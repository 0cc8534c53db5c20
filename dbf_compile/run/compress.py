"""``compress``: from a pretrained model to a folder that loads like any other of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from dbf_compile.compression.layers import LayerFactorizer, stacks_of
from dbf_compile.errors import CheckpointError, DBFError
from dbf_compile.files import user_path
from dbf_compile.keywords import CompressKeywords
from dbf_compile.machine import all_cores
from dbf_compile.options import CompressionConfig, CompressOptions
from dbf_compile.progress import say
from dbf_compile.records import resolve
from dbf_compile.run.context import Run
from dbf_compile.run.output import existing, work_folder
from dbf_compile.run.report import Report, one_kind_note, read_report
from dbf_compile.run.request import Request
from dbf_compile.run.steps import run_steps
from dbf_compile.run.work import Work


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made.

    Attributes:
        folder: the model, for ``from_pretrained``.
        report: the content of ``dbf_report.json``, by attribute or by key.
    """

    folder: Path
    report: Report

    def __str__(self) -> str:
        bits, coverage, judged = self.report.bits, self.report.coverage, self.report.evaluation
        share = f" in {coverage.share:.1%} of the weights" if coverage else ""
        whole = "" if bits.file is None else f", {bits.file:.3f} in the whole file"
        lines = [f"{self.folder}: {bits.factored:.3f} bits per weight{share}{whole}"]
        if not judged:
            return lines[0]
        if judged.kl is not None:
            lines.append(f"{judged.measure}: KL {judged.kl:.4f}, top-1 agreement {judged.top1_agreement:.1%}")
        if judged.kinds and judged.worst_kind is not None and len(judged.kinds) > 1:
            worst = judged.kinds[judged.worst_kind]
            lines.append(
                f"the worst kind is {judged.worst_kind}"
                + (f": KL {worst.kl:.4f}" if worst.kl is not None else "")
            )
        if judged.compressed is not None and judged.dense is not None:
            lines.append(f"dense {judged.dense:.4f}, compressed {judged.compressed:.4f} nats a token")
        if judged.error is not None:
            lines.append(f"{judged.measure}: {judged.error:.4f}")
        trained = [stage for stage in self.report.stages or () if stage.epochs is not None]
        dropped = sum(stage.epochs == 0 for stage in trained)
        if dropped:
            lines.append(
                f"{dropped} of {len(trained)} trainings were dropped: they lost on the windows that were kept back"
            )
        if self.report.data is not None and self.report.data.one_kind is not None:
            lines.append(one_kind_note(self.report.data.one_kind))
        return "\n".join(lines)


def compress(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    config: CompressionConfig | None = None,
    data: str | Path | Iterable[Any] | None = None,
    batches: Sequence[Any] | None = None,
    tokenizer: Any = None,
    **options: Unpack[CompressKeywords],
) -> Compressed:
    """Compress a pretrained model of transformers into a folder for ``from_pretrained``.

    Results are kept in ``<output>.work`` as they come. A run that was stopped continues where it was, and ends with the same
    files. Other processes that call ``compress`` with the same arguments share the work, on any machine that sees the folder;
    so do the ranks of torchrun.

    Args:
        model: the folder of a model, a GGUF file, its name on the Hub, or the model itself.
        output: the folder to write; it does not exist yet.
        config: a ``CompressOptions``, or another record of the same fields.
        data: what to calibrate with: path of a file of text or rows, a folder, a data set of the Hub or in memory, texts, or
            rows; see ``token_batches``. Or a mapping from kinds of text to such data. None, and no ``batches``: the model
            writes text itself (``own_text``); one that cannot is calibrated with random tokens, which is worse.
        batches: ready batches in place of text, for models that read something else.
        tokenizer: for ``data``; None for that of the model's folder.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        The folder and its report.

    Raises:
        OptionError, ConversionError: something was asked for that cannot be done.
        ResumeError: the work that is there belongs to other arguments.
        CheckpointError: the model's files are damaged, or results cannot be written.
    """
    settings = resolve(CompressOptions, config, options)
    from dbf_compile.integrations.bars import bars_of_transformers

    with bars_of_transformers(settings.progress):
        request = Request.of(model, user_path(output), settings, data, batches, tokenizer)
        try:
            return _compressed(request)
        except OSError as error:
            raise CheckpointError(
                f"{request.output}: {error}",
                "a folder that can be written, with room for the model",
                "make room, then compress again: what is done is kept",
            ) from error


def _compressed(request: Request) -> Compressed:
    """Return what is there already, or compress."""
    settings = request.config
    output, fingerprint = request.output, request.fingerprint()
    if output.exists():
        report = read_report(output)
        if report is not None and report.fingerprint == fingerprint:
            if not settings.keep_work:  # a process may have been killed when all was done but this
                shutil.rmtree(work_folder(output), ignore_errors=True)
            return Compressed(output, report)
        raise existing(output)
    say("looking at the layers", settings.progress)
    from dbf_compile.integrations.experts import linearize_experts_  # imports Dynamo

    linearize_experts_(request.model)
    stacks_of(
        request.model, LayerFactorizer(settings).for_model(request.model)
    )  # refuses names that match nothing
    work = Work(work_folder(output), fingerprint, settings.resume)
    _finish(Run(request, work))
    report = read_report(output)
    if report is None:
        raise CheckpointError(
            f"{output} without a readable report", "a folder as it was written", "compress again"
        )
    if not settings.keep_work:
        work.remove()
    return Compressed(output, report)


def _finish(run: Run) -> None:
    try:
        # Sums depend on the number of threads. All workers use the same number, so that results do not.
        with all_cores():
            run_steps(run)
    except (OSError, DBFError):
        if (
            not run.request.output.exists()
        ):  # else another worker has finished, and removed the work under this one
            raise
