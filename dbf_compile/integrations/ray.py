"""Ray: one function called in several tasks of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import ray


def run_tasks(function: Callable[[], Any], tasks: int, cpus: float, gpus: float) -> list[Any]:
    """Call a function in several tasks of a Ray cluster at once, and return what they return.

    Args:
        function: without arguments; it can be pickled.
        tasks: how many.
        cpus: cores of each task.
        gpus: GPUs of each task.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(_call)
    results: list[Any] = ray.get([task.remote(function) for _ in range(tasks)])
    return results


def _call(function: Callable[[], Any]) -> Any:
    return function()


def __getattr__(name: str) -> Any:
    # The former place of a public function. Not an import: this file is below those who call it.
    if name == "compress_on_ray":
        return import_module("dbf_compile.run.workers").compress_on_ray
    raise AttributeError(name)
