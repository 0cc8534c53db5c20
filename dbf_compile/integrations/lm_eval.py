"""Tasks of lm-eval, EleutherAI's evaluation harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dbf_compile.errors import OptionError
from dbf_compile.integrations.bars import bars_of_lm_eval
from dbf_compile.options import EvaluationConfig
from dbf_compile.progress import say


def task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Return lm-eval's ``TaskManager`` after checking the names of the tasks, before a model is loaded.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: a folder with further tasks, as YAML files.

    Raises:
        OptionError: lm-eval is not installed, or does not know a task.
    """
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


def run_tasks(
    model: nn.Module, tokenizer: Any, manager: Any, settings: EvaluationConfig, positions: int | None
) -> dict[str, float]:
    """Return the metrics of tasks by "task/metric".

    Args:
        model: of transformers.
        tokenizer: of the model.
        manager: from :func:`task_manager`; it knows the tasks.
        settings: tasks, examples of a task at most, and whether bars are shown.
        positions: how many tokens the model reads at once; lm-eval cuts longer examples from the left. None for what lm-eval
            finds out.

    Raises:
        OptionError: a task asks for more tokens than the model has positions.
    """
    say(f"running {', '.join(settings.tasks)}", settings.progress)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with bars_of_lm_eval(settings.progress):
            results = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, max_length=positions),
                tasks=list(settings.tasks),
                task_manager=manager,
                limit=settings.limit,
            )["results"]
    except AssertionError as error:
        reason = str(error).partition("\n")[0] or "an assertion of lm-eval"
        raise OptionError(
            f"tasks={list(settings.tasks)}, of which one does not go with the model ({reason})",
            f"tasks whose texts fit {positions} positions",
            "choose others, or a model of more positions",
        ) from error
    return {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
