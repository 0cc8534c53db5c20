"""More workers are more processes that call ``compress`` with the same arguments."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dbf_compile.machine import cores
from dbf_compile.options import CompressionConfig, CompressOptions
from dbf_compile.records import resolve
from dbf_compile.run.compress import Compressed, compress

_INPUTS = ("data", "batches", "tokenizer")


def compress_in_processes(
    model: str | Path,
    output: str | Path,
    *,
    processes: int,
    config: CompressionConfig | None = None,
    **arguments: Any,
) -> Compressed:
    """Call ``compress`` in several processes of this machine at once, which share the work and its cores.

    Args:
        model: folder or name of the model.
        output: the folder to write.
        processes: how many.
        config, **arguments: as for :func:`~dbf_compile.run.compress.compress`, ``data`` among them; the first process shows
            the progress, and ``workers`` counts for each.

    Returns:
        What ``compress`` returns.
    """
    settings, inputs = _settings(config, arguments, max(1, cores() // processes))
    quiet = replace(settings, progress=False)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        calls = [
            pool.submit(compress, model, output, config=quiet if rank else settings, **inputs)
            for rank in range(processes)
        ]
        results = [call.result() for call in calls]  # all of them: an error of any is raised
        return results[0]


def compress_on_ray(
    model: str | Path,
    output: str | Path,
    *,
    tasks: int,
    cpus: float = 1,
    gpus: float = 0,
    config: CompressionConfig | None = None,
    **arguments: Any,
) -> Compressed:
    """Call ``compress`` in several tasks of a Ray cluster at once; they share the work through the output's folder.

    Args:
        model: folder or name of the model, as every machine sees it.
        output: the folder to write, on a file system that every machine sees.
        tasks: how many.
        cpus: cores of each task.
        gpus: GPUs of each task.
        config, **arguments: as for :func:`~dbf_compile.run.compress.compress`, ``data`` among them.

    Returns:
        What ``compress`` returns.
    """
    from dbf_compile.integrations import ray

    settings, inputs = _settings(config, {"progress": False, **arguments}, max(1, int(cpus)))
    call = partial(compress, model, output, config=settings, **inputs)
    results: list[Compressed] = ray.run_tasks(call, tasks, cpus, gpus)
    return results[0]


def _settings(
    config: CompressionConfig | None, arguments: Mapping[str, Any], workers: int
) -> tuple[CompressOptions, dict[str, Any]]:
    """Return the options of every worker, and the arguments of ``compress`` that are no options."""
    inputs = {name: value for name, value in arguments.items() if name in _INPUTS}
    options = {name: value for name, value in arguments.items() if name not in _INPUTS}
    settings = resolve(CompressOptions, config, options)
    return replace(settings, workers=settings.workers or workers), inputs
