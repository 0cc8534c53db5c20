"""Ray: one function called in several tasks of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from dbf_compile.errors import ResumeError

_LOST = (NodeDiedError, OutOfMemoryError, WorkerCrashedError)
_GRACE = 60.0  # seconds

_log = logging.getLogger(__name__)


def first_result(function: Callable[[], Any], tasks: int, cpus: float, gpus: float) -> Any:
    """Call a function in several tasks of a Ray cluster at once, and return what the first that ends returns.

    Ray starts a task that was lost with its worker or its machine three times more; then the others go on without it. Once one
    has returned, the others have a minute to end: those that wait for a place in the cluster are not needed any more.

    Args:
        function: without arguments; it can be pickled.
        tasks: how many.
        cpus: cores of each task.
        gpus: GPUs of each task.

    Raises:
        ResumeError: all tasks were lost.
        Exception: what the function raises in the first task that fails; the others are ended.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(_call)
    running = [task.remote(function) for _ in range(tasks)]
    lost: BaseException | None = None
    try:
        while running:
            (ended, *_), running = ray.wait(running)
            try:
                result = ray.get(ended)
            except RayTaskError as error:
                raise error.cause from error
            except _LOST as error:
                _log.warning("a task was lost, and %d go on: %s", len(running), error)
                lost = error
                continue
            if running:
                _, running = ray.wait(running, num_returns=len(running), timeout=_GRACE)
            return result
    finally:
        for one in running:
            ray.cancel(one, force=True)
    raise ResumeError(
        f"{tasks} tasks that were lost with their workers",
        "memory for a model in each",
        "compress again, with fewer tasks on a machine: what is done is kept",
    ) from lost


def _call(function: Callable[[], Any]) -> Any:
    return function()


def __getattr__(name: str) -> Any:
    # The former place of a public function. Not an import: this file is below those who call it.
    if name == "compress_on_ray":
        return import_module("dbf_compile.run.workers").compress_on_ray
    raise AttributeError(name)
