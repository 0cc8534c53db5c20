"""More workers are more processes that call ``compress`` with the same arguments."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from dbf_compile.keywords import CompressKeywords
from dbf_compile.machine import cores
from dbf_compile.options import CompressionConfig, CompressOptions
from dbf_compile.records import resolve
from dbf_compile.run.compress import Compressed, compress


def compress_in_processes(
    model: str | Path,
    output: str | Path,
    *,
    processes: int,
    config: CompressionConfig | None = None,
    data: Any = None,
    **options: Unpack[CompressKeywords],
) -> Compressed:
    """Call ``compress`` in several processes of this machine at once, which share the work and its cores.

    Args:
        model: folder or name of the model.
        output: the folder to write.
        processes: how many.
        config, data, **options: as for :func:`~dbf_compile.run.compress.compress`; the first process shows the progress, and
            ``workers`` counts for each.

    Returns:
        What ``compress`` returns.
    """
    settings = resolve(CompressOptions, config, options)
    settings = replace(settings, workers=settings.workers or max(1, cores() // processes))
    quiet = replace(settings, progress=False)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        calls = [
            pool.submit(compress, model, output, config=quiet if rank else settings, data=data)
            for rank in range(processes)
        ]
        return next(iter([call.result() for call in calls]))
