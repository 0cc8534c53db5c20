"""The factorizer against the authors' own, and against other ways to spend the bits of a weight.

    make bench-factorizer                                    everything, about an hour on two cores
    python benchmarks/bench_factorizer.py --part targets     every matrix of MiniLM at 1, 1.5 and 2 bits
    python benchmarks/bench_factorizer.py --part best        the preset "best" too, on two matrices
    python benchmarks/bench_factorizer.py --part curves      error against bits, 0.5 to 4, with a plot
    python benchmarks/bench_factorizer.py --part precision   products of a GPU's TF32 and bfloat16, emulated
    python benchmarks/bench_factorizer.py --part seeds       means over seeds, where a single seed decides: 1 bit and less, very small matrices
    python benchmarks/bench_factorizer.py --part recovery    double binary products: how many are recovered exactly
    python benchmarks/bench_factorizer.py --part models      embeddings and perplexity of whole models
    python benchmarks/bench_factorizer.py --part large       one 4096 x 4096 matrix

Bits are the stored bits per weight: signs with padding, and scales. The authors' factors get the middle dimension at
which stored bits are equal. All methods factor a matrix in turn, in a process with one thread; there are as many
processes as cores. HQQ takes part where its package is installed: pip install --no-deps hqq einops termcolor
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from factorizer_models import encoder_rows, language_matrices, language_rows, load_encoder
from factorizer_peers import RoundedProducts, error_and_bits
from measure import RESULTS, commit, processor, versions, write_results
from torch import Tensor

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.compression.layers import MIN_MID_FEATURES
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import mid_features_for
from dbf_compile.linear import dense_linears, dense_weight
from dbf_compile.options import PRESETS


class Matrix(NamedTuple):
    """A weight [N, K] to factor, with the importance of its rows and columns."""

    name: str
    weight: Tensor
    importance: Importance | None


class Task(NamedTuple):
    """One matrix at one number of bits, to be factored by these methods in one process."""

    matrix: Matrix
    bits: float
    methods: tuple[str, ...]
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable[[], None]] = {
        "targets": targets,
        "best": best,
        "curves": curves,
        "precision": precision,
        "seeds": seeds,
        "recovery": recovery,
        "models": models,
        "large": large,
    }
    parser.add_argument("--part", choices=parts, action="append")
    for part in parser.parse_args().part or parts:
        parts[part]()
    print(f"{processor()}; {versions()}; commit {commit()}")


def targets() -> None:
    """Measure error and time of the authors' factorizer and of the presets, for every matrix of the encoder's blocks."""
    tasks = [
        Task(matrix, bits, ("official", "fast", "balanced"))
        for matrix in encoder_matrices()
        for bits in (2.0, 1.5, 1.0)
        if "layer" in matrix.name
    ]
    rows = run(tasks)
    summarize(rows, ("fast", "balanced"))
    write_results("factorizer_targets", rows)


def best() -> None:
    """Measure all presets on two matrices, the slowest included."""
    chosen = ("layer.2.attention.self.query", "layer.2.attention.output.dense")
    matrices = [matrix for matrix in encoder_matrices() if matrix.name.endswith(chosen)]
    methods = ("official", *PRESETS)
    rows = run([Task(matrix, bits, methods) for matrix in matrices for bits in (4.0, 2.0, 1.0)])
    summarize(rows, tuple(PRESETS))
    write_results("factorizer_best", rows)


def curves() -> None:
    """Measure error against stored bits, for a few matrices of every kind."""
    chosen = ("layer.2.attention.self.query", "layer.2.intermediate.dense")
    matrices = [matrix for matrix in encoder_matrices() if matrix.name.endswith(chosen)]
    generator = torch.Generator().manual_seed(0)
    matrices += [
        Matrix(f"Gaussian {rows}x{columns}", torch.randn(rows, columns, generator=generator), None)
        for rows, columns in ((384, 384), (1024, 256))
    ]
    matrices += [Matrix(*item) for item in language_matrices()]
    tasks = [
        Task(matrix, bits, ("official", "fast", "balanced"))
        for matrix in matrices
        for bits in (0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
        if fits(matrix, bits)
    ]
    tasks += [
        Task(matrix, 0.0, ("onebit", "rtn2", "rtn3", "rtn4", "hqq2", "hqq3", "hqq4")) for matrix in matrices
    ]
    rows = run(tasks)
    write_results("factorizer_curves", rows)
    plot_curves(rows)


def precision() -> None:
    """Measure errors with a GPU's products: operands of 11 (TF32) or 8 (bfloat16) bits, sums in float32."""
    chosen = ("layer.2.attention.self.query", "layer.2.intermediate.dense", "layer.2.output.dense")
    rows = []
    for matrix in encoder_matrices():
        if not matrix.name.endswith(chosen):
            continue
        for bits in (2.0, 1.0):
            errors = {}
            for name, digits in (("float32", None), ("tf32", 10), ("bfloat16", 7)):
                with RoundedProducts(digits):
                    errors[name] = error_and_bits("fast", matrix.weight, matrix.importance, bits)[0]
            ratios = {name: round(error / errors["float32"], 5) for name, error in errors.items()}
            rows.append({"matrix": matrix.name, "bits": bits, "error": errors["float32"], **ratios})
    write_results("factorizer_precision", list(show(iter(rows))))


def seeds() -> None:
    """Measure means over seeds where a single seed decides: at 1 bit and less, and for very small matrices."""
    matrices = [matrix for matrix in encoder_matrices() if "layer" in matrix.name]
    cases = [(matrix, bits, 4) for bits in (1.0, 0.75, 0.5) for matrix in matrices]
    for matrix in (Matrix(*item) for item in language_matrices()):
        cases += [(matrix, bits, 16) for bits in (0.75, 1.0, 1.5, 2.0, 2.5, 3.0) if fits(matrix, bits)]
    tasks = [Task(*case[:2], ("official", "fast"), seed) for case in cases for seed in range(case[2])]
    errors: dict[tuple[str, float, str], list[float]] = {}
    for row in run(tasks):
        errors.setdefault((row["matrix"], row["target"], row["method"]), []).append(row["error"])
    rows = []
    for matrix, bits, count in cases:
        theirs, ours = (errors[matrix.name, bits, method] for method in ("official", "fast"))
        mean = statistics.mean(theirs)
        rows.append(
            {
                "matrix": matrix.name,
                "target": bits,
                "seeds": count,
                "authors_spread": round(statistics.stdev(theirs) / mean, 5),
                "fast_spread": round(statistics.stdev(ours) / mean, 5),
                "fast_over_authors": round(statistics.mean(ours) / mean, 5),
            }
        )
    write_results("factorizer_seeds", list(show(iter(rows))))


def recovery() -> None:
    """Count the double binary products that one call recovers exactly."""
    rows = []
    for size, mid_features in ((16, 2), (32, 4), (32, 8), (64, 8), (96, 8), (128, 16), (128, 32)):
        errors = []
        for seed in range(12):
            weight = planted(size, mid_features, seed)
            errors.append(weighted_error(weight, factorize(weight, mid_features)))
        # Rounding scales to float16 leaves about 3e-7; two components that merged leave about 1 / mid_features.
        recovered = sum(error < 1e-5 for error in errors)
        rows.append({"size": size, "mid_features": mid_features, "weights": len(errors), "found": recovered})
    write_results("factorizer_recovery", list(show(rows)))
    print(f"{sum(row['found'] for row in rows)} of {sum(row['weights'] for row in rows)} found")


def planted(size: int, mid_features: int, seed: int) -> Tensor:
    """Return a random double binary product [size, size] with scales from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    out, into = (
        torch.randn(shape, generator=generator).sign()
        for shape in ((size, mid_features), (mid_features, size))
    )
    scales = torch.rand(2 * size + mid_features, generator=generator) + 0.5
    return scales[:size, None] * (out * scales[2 * size :]) @ into * scales[size : 2 * size]


def models() -> None:
    """Measure whole models with equal and allocated budgets, for every form of importance."""
    write_results("factorizer_encoder", list(show(encoder_rows())))
    rows = list(show(language_rows()))
    if rows:
        write_results("factorizer_language", rows)


def large() -> None:
    """Measure the cost of a 4096 x 4096 matrix at 2 bits: all of ``fast`` on a GPU, three of its iterations on a CPU."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    name = "factorizer_large"
    if torch.cuda.is_available():
        name, rows = f"{name}_gpu", []
        before = torch.get_float32_matmul_precision()
        for precision in ("highest", "high", "medium"):  # float32, TF32, bfloat16
            torch.set_float32_matmul_precision(precision)
            rows.append(cost(weight.cuda(), precision))
        torch.set_float32_matmul_precision(before)
    else:
        rows = [cost(weight, "highest")]
    write_results(name, list(show(iter(rows))))


def cost(weight: Tensor, precision: str) -> dict[str, Any]:
    """Factor a matrix at 2 bits; return time, memory and error."""
    N, K = weight.shape
    mid_features = mid_features_for(2.0, K, N)
    if weight.is_cuda:
        factorize(weight, mid_features, None, FactorizerConfig(iterations=1, sweeps=0))  # loads libraries
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(weight.device)
    start = time.perf_counter()
    whole, few = FactorizerConfig(iterations=PRESETS["fast"]), FactorizerConfig(iterations=3, sweeps=0)
    config = whole if weight.is_cuda else few  # times are multiplied
    factors = factorize(weight, mid_features, None, config)  # returns when its scales are on the host
    seconds = (time.perf_counter() - start) / config.iterations
    return {
        "shape": f"{N}x{K}",
        "device": torch.cuda.get_device_name() if weight.is_cuda else "CPU",
        "precision": precision,
        "bits": 2.0,
        "mid_features": mid_features,
        "threads": torch.get_num_threads(),
        "seconds_per_iteration": float(f"{seconds:.3g}"),
        "minutes_fast": float(f"{seconds * PRESETS['fast'] / 60:.3g}"),
        "minutes_balanced": float(f"{seconds * PRESETS['balanced'] / 60:.3g}"),
        "peak_memory_in_weights": round((peak_memory(weight.device) - before) / (4 * weight.numel()), 1),
        "error": round(weighted_error(weight, factors), 5) if config is whole else "",
    }


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def show(rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row


def encoder_matrices() -> list[Matrix]:
    """Return the weights of MiniLM with their importance for the calibration sentences."""
    model, batches = load_encoder()
    importance = calibrate(model, batches)
    return [
        Matrix(name, dense_weight(module).detach(), importance[name])
        for name, module in dense_linears(model).items()
        if name in importance
    ]


def fits(matrix: Matrix, bits: float) -> bool:
    """Return whether ``bits`` leave room for signs: in the smallest matrices scales alone take more."""
    out_features, in_features = matrix.weight.shape
    return mid_features_for(bits, in_features, out_features) >= MIN_MID_FEATURES


def run(tasks: list[Task]) -> list[dict[str, Any]]:
    """Run the tasks in parallel, large ones first; return a row for every method of each."""
    tasks = sorted(tasks, key=lambda task: -task.bits * task.matrix.weight.numel())
    workers = max(1, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(
        workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(show(row for rows in pool.imap_unordered(measured, tasks) for row in rows))


def measured(task: Task) -> list[dict[str, Any]]:
    """Return a row for every method of a task that is installed."""
    weight, importance = task.matrix.weight, task.matrix.importance
    rows = []
    for method in task.methods:
        start = time.process_time()
        result = error_and_bits(method, weight, importance, task.bits, task.seed)
        if result is not None:
            error, bits = result
            rows.append(
                {
                    "matrix": task.matrix.name,
                    "shape": f"{weight.shape[0]}x{weight.shape[1]}",
                    "target": task.bits,
                    "method": method,
                    "bits": round(bits, 4),
                    "error": float(f"{error:.5g}"),
                    "seconds": round(time.process_time() - start, 3),
                }
            )
    return rows


def summarize(rows: list[dict[str, Any]], methods: tuple[str, ...]) -> None:
    """Print the median error and time relative to the authors', and the worst matrix."""
    base = {(row["matrix"], row["target"]): row for row in rows if row["method"] == "official"}
    for method in methods:
        for bits in sorted({row["target"] for row in rows}, reverse=True):
            pairs = [
                (row, base[row["matrix"], bits])
                for row in rows
                if (row["method"], row["target"]) == (method, bits)
            ]
            errors = {row["matrix"]: row["error"] / peer["error"] for row, peer in pairs}
            times = [row["seconds"] / peer["seconds"] for row, peer in pairs]
            worst = max(errors, key=lambda name: errors[name])
            print(
                f"{method:9} {bits} bits: error {statistics.median(errors.values()):.4f} of the authors' "
                f"(worst {errors[worst]:.4f}, {worst}), time {statistics.median(times):.3f} (longest {max(times):.3f}), "
                f"{len(pairs)} matrices"
            )


def plot_curves(rows: list[dict[str, Any]]) -> None:
    """Draw error against bits, one plot a matrix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["matrix"] for row in rows))
    figure, axes = pyplot.subplots(
        2, (len(names) + 1) // 2, figsize=(15, 9), layout="constrained", squeeze=False
    )
    lines = {"official": ("o--", "#888888"), "fast": ("^-", "#86bbd8"), "balanced": ("o-", "#33658a")}
    points = {"onebit": ("s", "#d1495b"), "rtn": ("x", "#edae49"), "hqq": ("+", "#00798c")}
    for axis, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row["matrix"] == name]
        for method, (style, color) in lines.items():
            curve = sorted((row["bits"], row["error"]) for row in mine if row["method"] == method)
            axis.plot(*zip(*curve, strict=True), style, color=color, label=method, markersize=4)
        for method, (style, color) in points.items():
            curve = sorted((row["bits"], row["error"]) for row in mine if row["method"].startswith(method))
            if curve:
                axis.plot(*zip(*curve, strict=True), style, color=color, label=method, markersize=8)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("stored bits per weight")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("weighted squared error")
    axes[0][0].legend()
    path = RESULTS / "factorizer_curves.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"picture: {Path(*path.parts[-3:])}")


if __name__ == "__main__":
    main()
