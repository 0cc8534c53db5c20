"""Independent mode: statistics once, then every weight on its own, in any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

from dbf_compile.compression.jobs import Pool, run_jobs
from dbf_compile.machine import default_workers
from dbf_compile.run.context import PlacedJob, Run
from dbf_compile.run.work import WorkStore


def factor_independent(run: Run, placed: Sequence[PlacedJob]) -> None:
    """Factor weights that do not depend on each other; every one is a result of its own."""
    request = run.request
    workers = request.config.workers or default_workers(request.device)
    jobs = [one.job for one in placed]
    pool = Pool(workers, request.device)
    run_jobs(jobs, run.factorizer, WorkStore(run.work), request.config.progress, pool)
