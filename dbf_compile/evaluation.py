"""How far a compressed model is from the dense one, and how well either predicts text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbf_compile.calibration.batches import token_batches
from dbf_compile.calibration.compare import compare
from dbf_compile.calibration.model_io import to_device
from dbf_compile.errors import OptionError
from dbf_compile.machine import chosen_device


def evaluate_folder(
    model: str | Path,
    *,
    data: str | Path | None = None,
    dense: str | Path | None = None,
    length: int = 2048,
    windows: int = 10_000,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a model in a folder: perplexity and distance from the dense model on text, and tasks of lm-eval.

    Args:
        model: folder of a model, compressed or not, or its name on the Hub.
        data: path of a text, cut into windows that do not overlap.
        dense: the dense model, for KL and top-1 agreement.
        length: tokens of a window, which is the context length the perplexity belongs to.
        windows: at most so many.
        tasks: names of tasks of lm-eval, for which its package is to be installed.
        include_path: a folder with tasks of one's own, as YAML files of lm-eval.
        limit: examples of a task at most.
        device: where to; None for a GPU where there is one.
        trust_remote_code: as of ``from_pretrained``.

    Returns:
        What :func:`compare` returns, "context_length" and "windows"; for tasks their metrics by "task/metric".

    Raises:
        OptionError: lm-eval is wanted and not installed, or does not know a task.
    """
    from dbf_compile.integrations import pretrained

    manager = _checked_tasks(tasks, include_path) if tasks else None
    folder = pretrained.local_folder(model)
    tokenizer = pretrained.tokenizer_of(folder, trust_remote_code)
    if tasks and tokenizer.eos_token_id is None:  # lm-eval puts it in front of what has nothing in front
        raise OptionError(
            f"tasks={list(tasks)} with a tokenizer of {folder} that has no end-of-text token",
            "a tokenizer with eos_token",
            "set eos_token in its tokenizer_config.json",
        )
    found: dict[str, Any] = {}
    where = chosen_device(device)
    loaded = pretrained.open_any(folder, trust_remote_code).to(where)
    if data is not None:
        given = [to_device(each, where) for each in token_batches(data, tokenizer, length=length, count=windows)]
        other = None
        if dense is not None:
            other = pretrained.open_any(pretrained.local_folder(dense), trust_remote_code).to(where)
        found |= {"context_length": length, "windows": len(given), **compare(other, loaded, given)}
    if tasks:
        found |= _task_results(loaded, tokenizer, tasks, manager, limit)
    return found


def _checked_tasks(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Return lm-eval's ``TaskManager`` after looking for the tasks: before a model is loaded, which takes minutes."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(
            f"tasks={list(tasks)} without lm-eval ({error})",
            "lm-eval installed",
            "pip install 'dbf-compile[eval]'",
        ) from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise OptionError(
            f"tasks {unknown}",
            "tasks, groups and tags of lm-eval",
            "see lm-eval ls tasks, or pass include_path",
        )
    return manager


def _task_results(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int | None
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
    )["results"]
    return {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
