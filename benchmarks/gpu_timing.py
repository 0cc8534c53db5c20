"""Timing on one NVIDIA GPU, for bench_gpu, tune_gpu and one_launch: CUDA graphs that take turns, and what the device is."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


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
            print(f"{name} left out: {str(error).splitlines()[0]}", flush=True)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(1e3 * milliseconds(graph.replay) / calls[name][1])
    return {name: statistics.median(values) for name, values in samples.items()}


def _capture(call: Callable[[int], object], count: int) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of ``count`` calls, each on another weight."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(min(2, count)):
            call(index)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return graph


def milliseconds(call: Callable[[], object]) -> float:
    """Return the time of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth() -> float:
    """Return how fast the device copies memory, in GB/s, bytes read and written both counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def gpu() -> str:
    return torch.cuda.get_device_name()


def versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
