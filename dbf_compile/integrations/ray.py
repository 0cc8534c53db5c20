"""Ray: workers of one compression spread over a cluster whose machines see one file system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from dbf_compile.run.compress import Compressed, compress


def compress_on_ray(
    model: str | Path, output: str | Path, *, tasks: int, cpus: float = 1, gpus: float = 0, **options: Any
) -> Compressed:
    """Call ``compress`` in several tasks of a Ray cluster at once; they share the work through the output's folder.

    Args:
        model: folder or name of the model, as every machine sees it.
        output: the folder to write, on a file system that every machine sees.
        tasks: how many workers.
        cpus, gpus: what each takes of the cluster.
        **options: further arguments of :func:`~dbf_compile.run.compress.compress`.

    Returns:
        What ``compress`` returns.
    """
    work = ray.remote(num_cpus=cpus, num_gpus=gpus)(compress)
    options = {"workers": max(1, int(cpus)), "progress": False, **options}
    made: list[Compressed] = ray.get([work.remote(model, output, **options) for _ in range(tasks)])
    return made[0]
