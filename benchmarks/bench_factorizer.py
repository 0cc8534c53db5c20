"""The factorizer against the authors' own and against other ways to spend the bits of a weight.

    make bench-factorizer                                    everything, about an hour on two cores
    python benchmarks/bench_factorizer.py --part targets     every matrix of MiniLM at 1, 1.5 and 2 bits
    python benchmarks/bench_factorizer.py --part best        the preset "best" too, on two matrices
    python benchmarks/bench_factorizer.py --part curves      error against bits, 0.5 to 4, with a plot
    python benchmarks/bench_factorizer.py --part precision   products of a GPU's TF32 and bfloat16, emulated
    python benchmarks/bench_factorizer.py --part seeds       means over seeds, where single ones decide: 1 bit and less, very small matrices
    python benchmarks/bench_factorizer.py --part recovery    weights that are double binary products: how many are found
    python benchmarks/bench_factorizer.py --part models      embeddings and perplexity of whole models
    python benchmarks/bench_factorizer.py --part large       one 4096 x 4096 matrix

Bits are what is stored: signs with padding, and scales. The authors' factors get the middle dimension that makes true
bits equal. Each matrix is factored in a process with one thread, by all methods in turn, on as many processes as there
are cores. HQQ joins in where its package is installed: pip install --no-deps hqq einops termcolor
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
from measure import RESULTS, commit, processor, versions, write_results
from official_admm import official
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.compression.layers import MIN_MID_FEATURES
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import onebit
from dbf_compile.factors import mid_features_for, stored_bits
from dbf_compile.linear import dense_linears, dense_weight
from dbf_compile.options import PRESETS

GROUP = 64


class Matrix(NamedTuple):
    """A weight to factor, with the importance of its rows and columns."""

    name: str
    weight: Tensor
    importance: Importance | None


class Task(NamedTuple):
    """What one process does: one matrix at one number of bits, by these methods."""

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
    """Every matrix of the encoder's blocks: error and time of the authors' factorizer and of the presets."""
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
    """All presets, the one without a time limit among them, on two matrices."""
    chosen = ("layer.2.attention.self.query", "layer.2.attention.output.dense")
    matrices = [matrix for matrix in encoder_matrices() if matrix.name.endswith(chosen)]
    methods = ("official", *PRESETS)
    rows = run([Task(matrix, bits, methods) for matrix in matrices for bits in (4.0, 2.0, 1.0)])
    summarize(rows, tuple(PRESETS))
    write_results("factorizer_best", rows)


def curves() -> None:
    """Error against stored bits, for a few matrices of every kind."""
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
    """Errors with products as a GPU makes them: operands of 11 (TF32) or 8 (bfloat16) bits, sums in float32."""
    chosen = ("layer.2.attention.self.query", "layer.2.intermediate.dense", "layer.2.output.dense")
    rows = []
    for matrix in encoder_matrices():
        if not matrix.name.endswith(chosen):
            continue
        for bits in (2.0, 1.0):
            errors = {}
            for name, digits in (("float32", None), ("tf32", 10), ("bfloat16", 7)):
                with _Rounded(digits):
                    errors[name] = error_and_bits("fast", matrix.weight, matrix.importance, bits)[0]
            ratios = {name: round(error / errors["float32"], 5) for name, error in errors.items()}
            rows.append({"matrix": matrix.name, "bits": bits, "error": errors["float32"], **ratios})
    write_results("factorizer_precision", list(show(iter(rows))))


def seeds() -> None:
    """Where seeds decide: means over several, at 1 bit and less, of very small matrices."""
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


class _Rounded(TorchFunctionMode):
    """Rounds what goes into products to so many binary digits behind the first, to nearest."""

    def __init__(self, digits: int | None) -> None:
        super().__init__()
        self._dropped = None if digits is None else 23 - digits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._dropped and getattr(function, "__name__", "") in ("matmul", "mm", "bmm", "__matmul__"):
            args = tuple(self._round(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return function(*args, **(kwargs or {}))

    def _round(self, operand: Tensor) -> Tensor:
        if operand.dtype != torch.float32:
            return operand
        words, dropped = operand.contiguous().view(torch.int32), self._dropped
        half = (1 << (dropped - 1)) - 1 + ((words >> dropped) & 1)  # ties to even
        return ((words + half) & ~((1 << dropped) - 1)).view(torch.float32)


def recovery() -> None:
    """How many of the weights that are double binary products are found in one call."""
    rows = []
    for size, mid_features in ((16, 2), (32, 4), (32, 8), (64, 8), (96, 8), (128, 16), (128, 32)):
        errors = []
        for seed in range(12):
            weight = planted(size, mid_features, seed)
            errors.append(weighted_error(weight, factorize(weight, mid_features)))
        # Scales rounded to float16 leave about 3e-7; two components that became one leave about 1 / mid_features.
        found = sum(error < 1e-5 for error in errors)
        rows.append({"size": size, "mid_features": mid_features, "weights": len(errors), "found": found})
    write_results("factorizer_recovery", list(show(rows)))
    print(f"{sum(row['found'] for row in rows)} of {sum(row['weights'] for row in rows)} found")


def planted(size: int, mid_features: int, seed: int) -> Tensor:
    """Return a random double binary product, scales from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    out, into = (
        torch.randn(shape, generator=generator).sign()
        for shape in ((size, mid_features), (mid_features, size))
    )
    scales = torch.rand(2 * size + mid_features, generator=generator) + 0.5
    return scales[:size, None] * (out * scales[2 * size :]) @ into * scales[size : 2 * size]


def models() -> None:
    """Whole models: uniform and allocated budgets, every form of importance."""
    write_results("factorizer_encoder", list(show(encoder_rows())))
    rows = list(show(language_rows()))
    if rows:
        write_results("factorizer_language", rows)


def large() -> None:
    """What a matrix of a large model costs, 4096 x 4096 at 2 bits: all of ``fast`` on a GPU, 3 of its turns on a CPU."""
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
    """Factor a matrix at 2 bits, and return time, memory and error."""
    N, K = weight.shape
    mid_features = mid_features_for(2.0, K, N)
    if weight.is_cuda:
        factorize(weight, mid_features, None, FactorizerConfig(iterations=1, sweeps=0))  # starts libraries
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(weight.device)
    start = time.perf_counter()
    whole, few = FactorizerConfig(iterations=PRESETS["fast"]), FactorizerConfig(iterations=3, sweeps=0)
    config = whole if weight.is_cuda else few  # whose time is multiplied
    factors = factorize(weight, mid_features, None, config)  # its scales have come to the host: all is done
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
    """Return the most bytes taken so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def show(rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row


def encoder_matrices() -> list[Matrix]:
    """Return the weights of MiniLM with importances measured on the calibration sentences."""
    model, batches = load_encoder()
    importance = calibrate(model, batches)
    return [
        Matrix(name, dense_weight(module).detach(), importance[name])
        for name, module in dense_linears(model).items()
        if name in importance
    ]


def fits(matrix: Matrix, bits: float) -> bool:
    """Return whether ``bits`` leave room for signs: scales alone are more than that in the smallest matrices."""
    out_features, in_features = matrix.weight.shape
    return mid_features_for(bits, in_features, out_features) >= MIN_MID_FEATURES


def run(tasks: list[Task]) -> list[dict[str, Any]]:
    """Work the tasks, large ones first, and return a row for each."""
    tasks = sorted(tasks, key=lambda task: -task.bits * task.matrix.weight.numel())
    workers = max(1, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(
        workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(show(row for rows in pool.imap_unordered(measured, tasks) for row in rows))


def measured(task: Task) -> list[dict[str, Any]]:
    """Return a row for every method of a task that is there to be run."""
    weight, importance = task.matrix.weight, task.matrix.importance
    rows = []
    for method in task.methods:
        start = time.process_time()
        found = error_and_bits(method, weight, importance, task.bits, task.seed)
        if found is not None:
            error, bits = found
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


def error_and_bits(
    method: str, weight: Tensor, importance: Importance | None, bits: float, seed: int = 0
) -> tuple[float, float] | None:
    """Return the weighted error of a method and the bits it stores per weight; None where it is not installed."""
    out_features, in_features = weight.shape
    if method == "onebit":
        single = onebit(weight, importance)
        return weighted_error(weight, single, importance), single.bits_per_weight()
    if method[:-1] in ("rtn", "hqq"):
        stored = int(method[-1])
        dense = round_to_nearest(weight, stored) if method.startswith("rtn") else hqq(weight, stored)
        if dense is None:
            return None
        return weighted_error(weight, dense, importance), stored + 2 * 16 / GROUP
    mid_features = mid_features_for(bits, in_features, out_features)
    true_bits = stored_bits(in_features, mid_features, out_features) / weight.numel()
    if method == "official":
        return official(weight, mid_features, importance, seed), true_bits
    config = FactorizerConfig(iterations=PRESETS[method], seed=seed)
    factors = factorize(weight, mid_features, importance, config)
    return weighted_error(weight, factors, importance), true_bits


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return ``weight`` on 2^bits levels from the least to the largest entry of every group of 64 in a row."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True).half().float(), groups.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    levels = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return (low + levels * step).reshape(weight.shape)


def hqq(weight: Tensor, bits: int) -> Tensor | None:
    """Return what HQQ's package makes of ``weight`` in groups of 64 along the rows."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        return None
    options = {"nbits": bits, "group_size": GROUP, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    words, meta = Quantizer.quantize(weight, **options)
    return Quantizer.dequantize(words, meta).reshape(weight.shape)


def summarize(rows: list[dict[str, Any]], methods: tuple[str, ...]) -> None:
    """Print medians of error and time as shares of the authors', and the worst matrix."""
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
    """Draw error against bits, one picture a matrix."""
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
            found = sorted((row["bits"], row["error"]) for row in mine if row["method"] == method)
            axis.plot(*zip(*found, strict=True), style, color=color, label=method, markersize=4)
        for method, (style, color) in points.items():
            found = sorted((row["bits"], row["error"]) for row in mine if row["method"].startswith(method))
            if found:
                axis.plot(*zip(*found, strict=True), style, color=color, label=method, markersize=8)
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
