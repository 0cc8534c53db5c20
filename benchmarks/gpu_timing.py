"""Timing on one NVIDIA GPU, for bench_gpu, tune_gpu and one_launch: interleaved CUDA graphs, and the name of the device.

With ``--dry-run`` these programs run every line on the CPU, on small sizes; kernels run in Triton's interpreter. So a
mistake is seen without a GPU. Times mean nothing then and are not written; a contender that fails is an error.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined, Triton's own included

import torch
from measure import commit, write_results

DRY_RUN = "--dry-run" in sys.argv
DEVICE = "cpu" if DRY_RUN else "cuda"


def announce() -> None:
    """Print device, versions and commit; exit if there is no device."""
    if not DRY_RUN and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run this on a machine with one, or with --dry-run")
    print(f"{gpu()}; {versions()}; commit {commit()}", flush=True)


def report(name: str, rows: list[dict]) -> None:
    """Write a table of results with the device and its versions; a dry run writes none."""
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
    """Time calls as CUDA graphs that take turns; a call that cannot be captured is reported and left out.

    Args:
        calls: by name, a function of the index of a weight, and the number of weights.
        rounds: timings of each.

    Returns:
        The median time of one call in microseconds, by name.
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
    """Print that a contender is not measured, and why; a dry run raises the error."""
    if DRY_RUN:
        raise error
    print(f"{name} left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)


def _capture(call: Callable[[int], object], count: int) -> Callable[[], object]:
    """Return a CUDA graph of ``count`` calls, one for each weight."""
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
    """Return the milliseconds that one call takes on the device."""
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
    """Return the rate at which the device copies memory, in GB/s; bytes read and bytes written both count."""
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
