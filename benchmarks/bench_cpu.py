"""One layer on the CPU: dbf in every accuracy and instruction set against torch's and llama.cpp's products.

All contenders of a shape take turns in one process. Every call uses the next of many weights, so that none is in a
cache. One contender only reads as much memory, front to back. Weights are random; times do not depend on their values. A
layer of dbf is both stages with scales and bias; peers multiply by the dense matrix that it replaces. "compiled" is a
square layer through torch.compile, guards included.

    make bench-cpu                 all shapes, one and two threads, 512 tokens on the first shape
    python benchmarks/bench_cpu.py --shapes 4096x4096 --threads 1

llama.cpp takes part where its package is installed: pip install llama-cpp-python
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import RESULTS, commit, processor, versions, write_results
from torch import Tensor

import dbf_compile.ops
from dbf_compile.factors import mid_features_for, stored_bits
from dbf_compile.kernels.sign_matmul import cpu_kernel

# out_features x in_features
SHAPES = {
    "4096x4096": "Llama-2-7B, Llama-3-8B q and o",
    "11008x4096": "Llama-2-7B gate and up",
    "4096x11008": "Llama-2-7B down",
    "14336x4096": "Llama-3-8B gate and up",
    "3072x1024": "Qwen3-0.6B gate and up",
    "9728x2560": "Qwen3-4B gate and up",
}
READING = "reading memory"
ISAS = ("amx", "avx512_vbmi", "avx512", "avx2", "neon", "portable")


class Contender(NamedTuple):
    """A layer with many weights.

    Args:
        name: in the table.
        bits: stored bits per weight.
        bytes: size of one weight.
        run: multiplies by the weight of this index.
        count: number of weights.
        error: of the result, relative to float64.
    """

    name: str
    bits: float
    bytes: int
    run: Callable[[int], object]
    count: int
    error: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--prefill", nargs="*", type=int, default=[16, 512], help="numbers of tokens on the first shape"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of the measurement of a contender"
    )
    parser.add_argument("--megabytes", type=int, default=400, help="size of all weights of a contender")
    arguments = parser.parse_args()
    print(f"{processor()}; {versions()}; commit {commit()}")
    if not cpu_kernel.available():
        raise SystemExit("the C++ kernel could not be built")
    rows: list[dict] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        cases = [(shape, tokens) for shape in arguments.shapes for tokens in arguments.tokens]
        cases += [(arguments.shapes[0], tokens) for tokens in arguments.prefill]
        for shape, tokens in cases:
            N, K = map(int, shape.split("x"))
            rows += measure(N, K, tokens, threads, arguments.seconds, arguments.megabytes)
            path = write_results("cpu_layer", rows)
    plot(rows)
    print(f"\nwritten to {path}")


def measure(N: int, K: int, M: int, threads: int, seconds: float, megabytes: int) -> list[dict]:
    """Time all contenders of one shape, print a table and return its rows."""
    contenders = [reader(megabytes << 20), *make_contenders(N, K, M, megabytes << 20)]
    samples = interleave_calls(contenders, seconds)
    bandwidth = contenders[0].bytes / statistics.median(samples[READING]) / 1e9
    base = statistics.median(samples["torch bf16"])
    print(f"\n{N} x {K}, {M} token(s), {threads} thread(s)")
    print(
        f"{'':30}{'bits':>6}{'µs':>11}{'best':>11}{'GB/s':>7}{'of read':>9}{'x bf16':>8}{'error':>10}{'calls':>7}"
    )
    rows = []
    for contender in contenders:
        times = samples[contender.name]
        median = statistics.median(times)
        rate = contender.bytes / median / 1e9
        print(
            f"{contender.name:30}{contender.bits:6.2f}{1e6 * median:11.1f}{1e6 * min(times):11.1f}{rate:7.1f}"
            f"{rate / bandwidth:9.0%}{base / median:8.2f}{contender.error:10.1e}{len(times):7}",
            flush=True,
        )
        rows.append(
            {
                "shape": f"{N}x{K}",
                "tokens": M,
                "threads": threads,
                "contender": contender.name,
                "bits": round(contender.bits, 3),
                "median_us": round(1e6 * median, 1),
                "best_us": round(1e6 * min(times), 1),
                "gb_per_s": round(rate, 2),
                "of_read_bandwidth": round(rate / bandwidth, 3),
                "read_gb_per_s": round(bandwidth, 1),
                "times_torch_bf16": round(base / median, 2),
                "relative_error": f"{contender.error:.1e}",
                "calls": len(times),
            }
        )
    return rows


def interleave_calls(contenders: list[Contender], seconds: float) -> dict[str, list[float]]:
    """Call the contenders in turn, 5 ms each, until each had ``seconds``; return the seconds of every call."""
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    spent = dict.fromkeys(samples, 0.0)
    position = dict.fromkeys(samples, 0)
    for contender in contenders:
        contender.run(0)
    while any(spent[name] < seconds or len(times) < 9 for name, times in samples.items()):
        for contender in contenders:
            if spent[contender.name] >= seconds and len(samples[contender.name]) >= 9:
                continue
            turn = 0.0
            while turn < 0.005:
                index = position[contender.name] = (position[contender.name] + 1) % contender.count
                start = time.perf_counter()
                contender.run(index)
                elapsed = time.perf_counter() - start
                turn += elapsed
                spent[contender.name] += elapsed
                samples[contender.name].append(elapsed)
    return samples


def make_contenders(N: int, K: int, M: int, budget: int) -> list[Contender]:
    torch.manual_seed(0)
    x = torch.randn(M, K)
    contenders: list[Contender] = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        # fp16 on many tokens takes seconds and is not used in practice.
        if M < 100 or dtype != torch.float16:
            contenders.append(torch_linear(x, N, dtype, f"torch {name}", budget))
    contenders += torch_packed(x, N, budget)
    contenders += ggml_types(x, N, budget)
    for bits in (1.0, 2.0):
        contenders += dbf_layers(x, N, bits, budget)
    return contenders


def torch_linear(x: Tensor, N: int, dtype: torch.dtype, name: str, budget: int) -> Contender:
    K = x.shape[1]
    size = N * K * dtype.itemsize
    first = torch.randn(N, K)
    weights = [first.to(dtype) for _ in range(copies(budget, size))]
    operand = x.to(dtype)
    error = relative_error(F.linear(operand, weights[0]), x.double() @ first.double().T)
    return Contender(
        name, 8 * dtype.itemsize, size, lambda i: F.linear(operand, weights[i]), len(weights), error
    )


def torch_packed(x: Tensor, N: int, budget: int) -> list[Contender]:
    """Return torch's weight-only products: int8 per row, int4 in groups of 128; activations in bf16."""
    K = x.shape[1]
    operand, weight = x.bfloat16(), torch.randn(N, K)
    truth = x.double() @ weight.double().T
    products = []
    scale8 = weight.abs().amax(1) / 127
    int8 = (weight / scale8[:, None]).round().to(torch.int8)
    weights8, scales8 = [int8.clone() for _ in range(copies(budget, N * K))], scale8.bfloat16()
    run8 = lambda i: torch._weight_int8pack_mm(operand, weights8[i], scales8)  # noqa: E731
    products.append(
        Contender(
            "torch int8",
            8 + 16 / K,
            N * K + 2 * N,
            run8,
            len(weights8),
            relative_error(run8(0), truth),
        )
    )
    group = 128
    if K % group == 0 and N % 16 == 0:
        grouped = weight.view(N, K // group, group)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = (high - low) / 15
        zero = low + 8 * scale
        levels = (
            ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(N, K)
        )
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        weights4 = [packed.clone() for _ in range(copies(budget, N * K // 2))]
        pairs = torch.stack([scale.T, zero.T], -1).contiguous().bfloat16()
        run4 = lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(operand, weights4[i], group, pairs)  # noqa: E731
        products.append(
            Contender(
                "torch int4 (128)",
                4 + 32 / group,
                N * K // 2 + 4 * N * K // group,
                run4,
                len(weights4),
                relative_error(run4(0), truth),
            )
        )
    return products


def dbf_layers(x: Tensor, N: int, bits: float, budget: int) -> list[Contender]:
    """Return a factored layer in every instruction set and accuracy, and a compiled one if it is square."""
    M, K = x.shape
    R = mid_features_for(bits, K, N)
    size = stored_bits(K, R, N) // 8
    # Random words are valid interleaved signs.
    signs = [
        torch.randint(-(2**31), 2**31, (rows, -(-columns // 32)), dtype=torch.int32)
        for rows, columns in ((R, K), (N, R))
    ]
    scales = [torch.rand(count, generator=torch.Generator().manual_seed(count)).half() for count in (K, R, N)]
    layers = [[tensor.clone() for tensor in (*signs, *scales)] for _ in range(copies(budget, size))]
    bias, out = torch.rand(N), torch.empty(M, N)
    operands = (x.double(), *signs, *scales, bias.double(), torch.float64)
    truth = dbf_compile.ops.double_binary_linear(*operands, interleaved=True)
    op = torch.ops.dbf_native.double_binary_linear.out
    contenders = []

    def add(name: str, run: Callable[[int], Tensor]) -> None:
        name, error = f"dbf {bits:g} bit {name}", relative_error(run(0), truth)
        contenders.append(Contender(name, 8 * size / (N * K), size, run, len(layers), error))

    for isa in usable_isas():
        if isa == "portable" and M * N * K > 1 << 26:
            continue
        for accuracy in ("exact", "fast"):

            def run(i: int, isa: str = isa, fast: bool = accuracy == "fast") -> Tensor:
                os.environ["DBF_CPU_ISA"] = isa
                return op(x, *layers[i], bias, interleaved=True, fast=fast, out=out)

            add(f"{isa} {accuracy}", run)
    os.environ.pop("DBF_CPU_ISA", None)
    # Compiling takes longer than measuring, and its overhead is the same for every shape.
    for accuracy in ("exact", "fast") if M == 1 and N == K else ():
        add(f"compiled {accuracy}", compiled_layer(x, layers, bias, accuracy))
    return contenders


def compiled_layer(
    x: Tensor, layers: list[list[Tensor]], bias: Tensor, accuracy: str
) -> Callable[[int], Tensor]:
    """Return a function that multiplies by the layer of an index, through torch.compile."""
    torch.compiler.reset()
    options = {"accuracy": accuracy}
    layer = torch.compile(dbf_compile.ops.double_binary_linear, backend="dbf", dynamic=False, options=options)

    def run(i: int) -> Tensor:
        os.environ.pop("DBF_CPU_ISA", None)
        return layer(x, *layers[i], bias, torch.float32, interleaved=True)

    return run


def usable_isas() -> list[str]:
    """Return the instruction sets that this processor has."""
    usable = []
    one = torch.ones(1, 1, dtype=torch.int32)
    for isa in ISAS:
        os.environ["DBF_CPU_ISA"] = isa
        try:
            torch.ops.dbf_native.sign_matmul.out(torch.ones(1, 1), one, out=torch.ones(1, 1))
            usable.append(isa)
        except RuntimeError:
            continue
    os.environ.pop("DBF_CPU_ISA", None)
    return usable


def ggml_types(x: Tensor, N: int, budget: int) -> list[Contender]:
    """Return products of llama.cpp, called in the library inside llama-cpp-python; none where that is missing."""
    from ggml import load, make_product

    library = load()
    if library is None:
        return []
    products = []
    for name, bits in (("Q2_K", 2.625), ("TQ2_0", 2.0625), ("Q4_K", 4.5), ("F16", 16.0)):
        size = int(N * x.shape[1] * bits / 8)
        product = make_product(library, name, x, N, copies(budget, size), torch.get_num_threads())
        products.append(Contender(f"llama.cpp {name}", bits, size, product.run, product.count, product.error))
    return products


def copies(budget: int, size: int) -> int:
    """Return how many weights of ``size`` bytes exceed the last-level cache."""
    return max(2, -(-budget // size))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


def reader(budget: int) -> Contender:
    """Return a contender that reads 64 MB of memory, the rate that products are compared with.

    The dot product of one half with the other is torch's fastest way to read memory.
    """
    size = 64 << 20
    halves = [torch.ones(2, size // 8) for _ in range(copies(budget, size))]
    return Contender(READING, 0.0, size, lambda i: torch.dot(*halves[i]), len(halves), 0.0)


def plot(rows: list[dict]) -> None:
    """Draw the speed with one token on one thread, one plot a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [
        row
        for row in rows
        if row["tokens"] == 1 and row["threads"] == rows[0]["threads"] and row["contender"] != READING
    ]
    shapes = list(dict.fromkeys(row["shape"] for row in chosen))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 6), squeeze=False, sharey=True)
    for axis, shape in zip(axes[0], shapes, strict=True):
        of_shape = [row for row in chosen if row["shape"] == shape]
        colors = ["tab:orange" if row["contender"].startswith("dbf") else "tab:gray" for row in of_shape]
        axis.barh(
            [row["contender"] for row in of_shape],
            [row["times_torch_bf16"] for row in of_shape],
            color=colors,
        )
        axis.set_title(shape)
        axis.set_xlabel("times as fast as torch bf16")
    axes[0][0].invert_yaxis()
    figure.suptitle(f"one token, {rows[0]['threads']} thread(s), {processor()}")
    figure.tight_layout()
    figure.savefig(RESULTS / "cpu_layer.png", dpi=100)


if __name__ == "__main__":
    main()
