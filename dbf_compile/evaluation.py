"""Evaluation of a model: perplexity on text, distance from the dense model, tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dbf_compile.calibration.batches import windows_for
from dbf_compile.calibration.compare import compare, compare_kinds
from dbf_compile.calibration.kinds import by_kind
from dbf_compile.calibration.limits import checked, positions_of
from dbf_compile.calibration.model_io import check_reads_tokens, to_device
from dbf_compile.calibration.offload import offloaded
from dbf_compile.errors import DBFError, OptionError
from dbf_compile.keywords import EvaluationKeywords
from dbf_compile.machine import chosen_device
from dbf_compile.options import EvaluationConfig
from dbf_compile.progress import over, say
from dbf_compile.records import resolve
from dbf_compile.run.page import update_evaluation
from dbf_compile.run.report import Report, read_report

Model = str | Path | nn.Module
_LENGTH = 2048  # tokens of a window, as usual in evaluations of perplexity


def evaluate(
    model: Model,
    data: str | Path | Iterable[Any] | None = None,
    *,
    dense: Model | None = None,
    tokenizer: Any = None,
    config: EvaluationConfig | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Any]:
    """Measure a model: perplexity and distance from the dense model on text, and tasks of lm-eval.

    Args:
        model: folder of a model, compressed or not, a GGUF file, its name on the Hub, or the model itself, which is left as it was.
        data: cut into windows that do not overlap; as for ``token_batches``, or a mapping from kind of text to such data
            (:func:`~dbf_compile.calibration.kinds.by_kind`), which are judged one by one. None: tasks alone.
        dense: the dense model, for KL and top-1 agreement.
        tokenizer: of the model; None for that of its folder.
        config: context length, windows, tasks, device.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        With data: "context_length", "windows", "perplexity", "compressed" (nats a token), "measure"; with a dense model also
        "kl" (nats), "nats_lost", "top1_agreement" and "dense" (nats a token). Of several kinds of text these are means, "kinds"
        has the figures of each, and "worst_kind" its name. "calibrated_with_one_kind": the text that a folder was calibrated
        with, if it was of one kind alone. With tasks: their metrics by "task/metric".

    Raises:
        OptionError: neither data nor tasks; lm-eval is missing or does not know a task; an unknown or ill-typed option; a
            length that exceeds the model's positions.
        ConversionError: no model, no tokenizer, data that cannot be read, or too little of it.
    """
    settings = resolve(EvaluationConfig, config, options)
    chosen_device(settings.device)  # refuses one that is not there before anything is opened
    if data is None and not settings.tasks:
        raise OptionError("neither data nor tasks", "one of them", "pass --data text.txt, or --tasks piqa")
    report = _report_of(model, data, settings)
    manager = None
    if settings.tasks:
        say("looking the tasks up in lm-eval", settings.progress)
        from dbf_compile.integrations import lm_eval

        manager = lm_eval.task_manager(settings.tasks, settings.include_path)
    say(f"opening {_name(model)}", settings.progress)
    from dbf_compile.integrations.bars import bars_of_transformers

    with bars_of_transformers(settings.progress):
        if tokenizer is None:
            tokenizer = _tokenizer_of(model, settings.trust_remote_code)
        if settings.tasks:
            _check_end_of_text(model, tokenizer, settings)
        with _ready(model, settings) as opened:
            results: dict[str, Any] = {}
            if data is not None:
                results = _on_data(opened, dense, data, tokenizer, settings) | _one_kind(report)
            if settings.tasks:
                positions = positions_of(opened)
                results |= lm_eval.run_tasks(opened, tokenizer, manager, settings, positions)
    if settings.update_report and report is not None:
        update_evaluation(Path(str(model)), report, results)
    return results


def _check_end_of_text(model: Model, tokenizer: Any, settings: EvaluationConfig) -> None:
    """Refuse a tokenizer without end-of-text token: lm-eval puts it in front of what has nothing in front."""
    if tokenizer.eos_token_id is None:
        raise OptionError(
            f"tasks={list(settings.tasks)} with a tokenizer of {_name(model)} that has no end-of-text token",
            "a tokenizer with eos_token",
            "set eos_token in its tokenizer_config.json",
        )


def _on_data(
    model: nn.Module, dense: Model | None, data: Any, tokenizer: Any, settings: EvaluationConfig
) -> dict[str, Any]:
    """Return perplexity, and the distance from the dense model, of every kind of text if the data has kinds."""
    check_reads_tokens(model)
    kinds = by_kind(data, settings.column)
    windows = _windows(model, {"": data} if kinds is None else kinds, tokenizer, settings)
    with ExitStack() as stack:
        other = None
        if dense is not None:
            say(f"opening {_name(dense)}", settings.progress)
            other = stack.enter_context(_ready(dense, settings))
            for part in windows.values():
                checked(other, part)
        device = chosen_device(settings.device)
        batches = {
            kind: (
                to_device(batch, device)
                for batch in over(part, f"evaluating {kind}".strip(), "window", settings.progress)
            )
            for kind, part in windows.items()
        }
        measured = (
            compare(other, model, batches[""]) if kinds is None else compare_kinds(other, model, batches)
        )
    for kind, figures in measured.get("kinds", {}).items():
        measured["kinds"][kind] = {"windows": len(windows[kind]), **figures}
    every = [window for part in windows.values() for window in part]
    return {"context_length": every[0]["input_ids"].shape[1], "windows": len(every), **measured}


def _windows(
    model: nn.Module, kinds: Mapping[str, Any], tokenizer: Any, settings: EvaluationConfig
) -> dict[str, list[dict[str, Any]]]:
    """Return the windows of every kind of text; what cannot be read is named by its kind."""
    windows = {}
    for kind, source in kinds.items():
        try:
            windows[kind] = windows_for(model, source, tokenizer, settings, _LENGTH, settings.windows)
        except DBFError as error:
            raise (error.inside(kind) if kind else error) from error.__cause__
    return windows


def _report_of(model: Model, data: Any, settings: EvaluationConfig) -> Report | None:
    """Return the report of the compression that wrote a folder; of a model in memory or on the Hub there is none."""
    report = None if isinstance(model, nn.Module) else read_report(Path(model))
    if settings.update_report and (report is None or data is None):
        raise OptionError(
            f"update_report=True for {_name(model)} {'without data' if report else 'without a report'}",
            "a folder that compress wrote, and data",
            "leave update_report out",
        )
    return report


def _one_kind(report: Report | None) -> dict[str, str]:
    """Return what a model was calibrated with, if that is text of one kind alone."""
    kind = None if report is None or report.data is None else report.data.one_kind
    return {} if kind is None else {"calibrated_with_one_kind": kind}


def evaluate_folder(
    model: str | Path,
    *,
    data: str | Path | None = None,
    dense: str | Path | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Any]:
    """Call :func:`evaluate`, under its former name; without data and tasks the result is empty."""
    if data is None and not options.get("tasks"):
        return {}
    return evaluate(model, data, dense=dense, **options)


def _tokenizer_of(model: Model, trust_remote_code: bool) -> Any:
    from dbf_compile.integrations import pretrained

    folder = None if isinstance(model, nn.Module) else pretrained.local_folder(model)
    return pretrained.tokenizer_of(folder, trust_remote_code)


@contextmanager
def _ready(model: Model, settings: EvaluationConfig) -> Iterator[nn.Module]:
    """Yield a model on the device in evaluation mode; one of the caller's is left as it was."""
    from dbf_compile.integrations import pretrained

    device: torch.device | None = chosen_device(settings.device)
    if not isinstance(model, nn.Module):
        folder = pretrained.local_folder(model)
        yield pretrained.open_any(folder, settings.trust_remote_code).to(device)
        return
    modes = {module: module.training for module in model.modules()}
    # Hooks of accelerate move what flows through a model, and load what lies on the CPU or on the disk.
    has_hooks = any(hasattr(module, "_hf_hook") for module in modes)
    try:
        with offloaded(model, [], None if has_hooks else device):
            yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
