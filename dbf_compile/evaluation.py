"""Evaluation of a model: perplexity on text, distance from the dense model, tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from dbf_compile.calibration.batches import token_batches
from dbf_compile.calibration.compare import compare
from dbf_compile.calibration.model_io import to_device
from dbf_compile.errors import OptionError
from dbf_compile.keywords import EvaluationKeywords
from dbf_compile.machine import chosen_device
from dbf_compile.options import EvaluationConfig
from dbf_compile.records import resolve

Model = str | Path | nn.Module


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
        model: folder of a model, compressed or not, its name on the Hub, or the model itself, which is moved to the device and
            left in evaluation mode.
        data: text, cut into windows that do not overlap; as for ``token_batches``. None: tasks alone.
        dense: the dense model, for KL and top-1 agreement.
        tokenizer: of the model; None for that of its folder.
        config: context length, windows, tasks, device.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        With data: "context_length", "windows", "perplexity", "compressed" (nats a token), "measure"; with a dense model also
        "dense" (nats a token), "kl" (nats) and "top1_agreement". With tasks: their metrics by "task/metric".

    Raises:
        OptionError: neither data nor tasks; lm-eval is missing or does not know a task; an unknown or ill-typed option.
        ConversionError: no model, no tokenizer, or too little text.
    """
    settings = resolve(EvaluationConfig, config, options)
    if data is None and not settings.tasks:
        raise OptionError("neither data nor tasks", "one of them", "pass --data text.txt, or --tasks piqa")
    manager = None
    if settings.tasks:
        from dbf_compile.integrations import lm_eval

        manager = lm_eval.task_manager(settings.tasks, settings.include_path)
    device, trust = chosen_device(settings.device), settings.trust_remote_code
    if tokenizer is None:
        tokenizer = _tokenizer_of(model, trust)
    # lm-eval puts the end-of-text token in front of what has nothing in front.
    if settings.tasks and tokenizer.eos_token_id is None:
        raise OptionError(
            f"tasks={list(settings.tasks)} with a tokenizer of {model} that has no end-of-text token",
            "a tokenizer with eos_token",
            "set eos_token in its tokenizer_config.json",
        )
    opened = _opened(model, trust).to(device)
    results: dict[str, Any] = {}
    if data is not None:
        windows = token_batches(data, tokenizer, length=settings.length, count=settings.windows)
        batches = [to_device(batch, device) for batch in windows]
        other = None
        if dense is not None:
            other = _opened(dense, trust).to(device)
        results |= {"context_length": settings.length, "windows": len(batches)}
        results |= compare(other, opened, batches)
    if settings.tasks:
        results |= lm_eval.run_tasks(opened, tokenizer, settings.tasks, manager, settings.limit)
    return results


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


def _opened(model: Model, trust_remote_code: bool) -> nn.Module:
    """Return a model in evaluation mode."""
    from dbf_compile.integrations import pretrained

    if isinstance(model, nn.Module):
        return model.eval()
    opened: nn.Module = pretrained.open_any(pretrained.local_folder(model), trust_remote_code)
    return opened
