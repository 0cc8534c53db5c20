"""Timing on one NVIDIA GPU, for bench_gpu, tune_gpu and one_launch: CUDA graphs that take turns, and what the device is.

With ``--dry-run`` these programs do all that they do on the CPU, on small sizes, kernels that they launch themselves in
Triton's interpreter: a device is not there to find out that a line of them is wrong. Times mean nothing then and are not
written, and what would be left out on a device is an error.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, Triton's own too

import torch
from measure import commit, write_results

DRY_RUN = "--dry-run" in sys.argv
DEVICE = "cpu" if DRY_RUN else "cuda"


def announce() -> None:
    """Say where figures come from, or that there is no device."""
    if not DRY_RUN and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run this on a machine with one, or with --dry-run")
    print(f"{gpu()}; {versions()}; commit {commit()}", flush=True)


def report(name: str, rows: list[dict]) -> None:
    """Write a table of results, with the device and its versions; a dry run has none."""
    if DRY_RUN:
        print(f"dry run: {len(rows)} rows of {name} not written", flush=True)
        return
    if not rows:
        raise SystemExit(f"nothing was measured for {name}")
    common = {"gpu": gpu(), "gpu_versions": versions()}
    print(f"written to {write_results(name, [{**row, **common} for row in rows])}", flush=True)


def interleaved_graphs(
    calls: dict[str, tuple[Callable[[int], object], int]], rounds: int
) -> dict[str, float]:
    """Time calls in CUDA graphs that take turns; who cannot be captured is left out and said so.

    Args:
        calls: by name, a function of the number of a weight, and how many weights there are.
        rounds: turns of each.

    Returns:
        By name, the median time of one call in microseconds.
    """
    graphs = {}
    for name, (call, count) in calls.items():
        try:
            graphs[name] = _capture(call, count)
        except Exception as error:
            leave_out(name, error)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(1e3 * milliseconds(graph) / calls[name][1])
    return {name: statistics.median(values) for name, values in samples.items()}


def leave_out(name: str, error: Exception) -> None:
    """Say that a contender is not measured, and why."""
    if DRY_RUN:
        raise error
    print(f"{name} left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)


def _capture(call: Callable[[int], object], count: int) -> Callable[[], object]:
    """Return a CUDA graph of ``count`` calls, each on another weight."""
    if DRY_RUN:
        return lambda: [call(index) for index in range(count)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(min(2, count)):
            call(index)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return graph.replay


def milliseconds(call: Callable[[], object]) -> float:
    """Return the time of one call on the device."""
    if DRY_RUN:
        before = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth() -> float:
    """Return how fast the device copies memory, in GB/s, bytes read and written both counted."""
    source = torch.empty(1 << (20 if DRY_RUN else 30), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def synchronize() -> None:
    """Wait for the device."""
    if not DRY_RUN:
        torch.cuda.synchronize()


def gpu() -> str:
    return "dry run on the CPU" if DRY_RUN else torch.cuda.get_device_name()


def versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
