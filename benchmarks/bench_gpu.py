"""One NVIDIA GPU: kernels are checked on fresh data and timed against their peers; then whole models.

    python benchmarks/bench_gpu.py                       all of it; meant for 8 minutes, not timed yet
    python benchmarks/bench_gpu.py --parts check layers --shapes 28672x4096     other layers, as models fuse them
    python benchmarks/bench_gpu.py --parts models --models qwen3-8b
    python benchmarks/bench_gpu.py --dry-run             small sizes on the CPU, no times

Checks compare with float64 on the same device; the memory of results is filled with NaN beforehand. Layers are timed
inside CUDA graphs. Each call uses the next of many weights, so that none is in the cache; contenders take turns. A layer
of dbf is both stages with scales, compiled; peers multiply by the dense matrix that it replaces. Models have random
weights, a static cache and ``mode="reduce-overhead"``; tokens do not wait for the host. GemLite takes part for single
tokens where it is installed: pip install gemlite
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpu_timing import (
    DEVICE,
    DRY_RUN,
    announce,
    copy_bandwidth,
    interleaved_graphs,
    leave_out,
    report,
)

# isort: split
import torch
import torch.nn.functional as F
from gpu_models import DEFAULT_VARIANTS, MODELS, VARIANTS, random_device_factors, shapes, time_model
from torch import Tensor, nn

import dbf_compile.ops
from dbf_compile import DoubleBinaryLinear
from dbf_compile.factors import mid_features_for
from dbf_compile.kernels.sign_matmul.reference import sign_matmul
from dbf_compile.kernels.sign_matmul.regimes import DECODE_TOKENS
from dbf_compile.signs import interleave, pack_signs, words_per_row

DEFAULT_SHAPES = ("4096x4096", "12288x4096", "22016x4096")
TOKENS = (1, 4, 16, 512, 2048)
BITS = (1.0, 2.0)
SMALL_SHAPE, SMALL_TOKENS = "96x64", (1, 40)
PARTS = ("check", "layers", "models")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shapes", nargs="+", default=list(DEFAULT_SHAPES), choices=shapes())
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--models", nargs="+", default=["llama-2-7b"], choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT_VARIANTS), choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each contender")
    parser.add_argument("--new", type=int, default=32, help="tokens that a model decodes in one timing")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU, no times")
    parser.add_argument("--table", default="", help="suffix of the names of the tables")
    arguments = parser.parse_args()
    if DRY_RUN:
        arguments.shapes, arguments.tokens, arguments.rounds = [SMALL_SHAPE], SMALL_TOKENS, 1
        arguments.new, arguments.variants = 2, VARIANTS[-2:]
    announce()
    if "check" in arguments.parts:
        check([] if DRY_RUN else [(4096, 4096)])
    if "layers" in arguments.parts:
        time_layers(arguments)
    if "models" in arguments.parts:
        rows = []
        for model, variant in itertools.product(arguments.models, arguments.variants):
            try:
                rows.append(time_model(model, variant, arguments.new))
            except Exception as error:
                leave_out(f"{model}, {variant}", error)
            report(f"gpu_decode{arguments.table}", rows)
        print_table(rows)


# --- correctness ----------------------------------------------------------------------------------------------------


def check(large: list[tuple[int, int]]) -> None:
    """Compare the operator with the reference in float64, and a compiled layer with the eager one; exit at a difference.

    Args:
        large: rows and columns of shapes to check besides small odd ones.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    torch.manual_seed(time.time_ns() % 2**31)
    # Deterministic algorithms fill new memory with NaN, which shows entries that a kernel forgets to write.
    torch.use_deterministic_algorithms(True)
    count = 0
    every = (torch.float32, torch.bfloat16, torch.float16)
    for (N, K), dtypes in {(1, 1): every[1:2], (33, 97): every, **dict.fromkeys(large, every[:2])}.items():
        signs = torch.randint(0, 2, (N, K), device=DEVICE, dtype=torch.int8) * 2 - 1
        words = pack_signs(signs)
        interleaved = interleave(words)
        vectors = [torch.rand(size, device=DEVICE) + 0.5 for size in (K, N, N)]
        for M in (1, 3, DECODE_TOKENS, DECODE_TOKENS + 1, 100, 513):
            for dtype in dtypes:
                x = torch.randn(M, K, device=DEVICE).to(dtype)
                call = (x, interleaved, *vectors, dtype, True)
                y = torch.ops.dbf.sign_matmul(*call)
                truth = sign_matmul(x.double(), words, *(v.double() for v in vectors))
                # The result is rounded once, and so are the operands of tensor cores, each by at most half an eps.
                allowed = torch.finfo(dtype).eps + 2e-6
                error = ((y.double() - truth).norm() / truth.norm()).item()
                if not error <= allowed or not torch.equal(y, torch.ops.dbf.sign_matmul(*call)):
                    raise SystemExit(
                        f"WRONG: {M} tokens, {N}x{K}, {dtype}: error {error:.1e} of {allowed:.1e}"
                    )
                count += 1
    for M in (1, 5, 40, 200):
        pair = (random_device_factors(2100, 3000, 2.0), random_device_factors(96, 2100, 2.0))
        # The first layer is split over K; the reader of its result adds the partial sums.
        layers = nn.Sequential(DoubleBinaryLinear(pair[0]), nn.ReLU(), DoubleBinaryLinear(pair[1]))
        x = torch.randn(M, 3000, device=DEVICE, dtype=torch.bfloat16)
        with torch.inference_mode():
            compiled = torch.compile(layers.bfloat16(), backend="dbf", fullgraph=True, dynamic=False)(x)
            truth = layers.double()(x.double())
            error = ((compiled.double() - truth).norm() / truth.norm()).item()
        if not error <= 2 * torch.finfo(torch.bfloat16).eps:
            raise SystemExit(f"WRONG: a compiled layer of {M} tokens: error {error:.1e}")
        count += 1
    torch.use_deterministic_algorithms(False)
    print(f"{count} checks passed", flush=True)


# --- layers ---------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """A layer with many weights.

    Args:
        name: in the table.
        bytes: size of one weight.
        run: multiplies x by the weight of this index.
        count: number of weights.
    """

    name: str
    bytes: int
    run: Callable[[Tensor, int], object]
    count: int


def contenders(N: int, K: int) -> Iterator[Contender]:
    """Yield all contenders of a shape; the weights of each exceed the cache."""
    enough = lambda size: 2 if DRY_RUN else max(2, -(-(256 << 20) // size))  # noqa: E731
    for dtype in (torch.bfloat16, torch.float16):
        size = 2 * N * K
        weights = [torch.randn(N, K, device=DEVICE, dtype=dtype) for _ in range(enough(size))]
        name = f"cuBLAS {str(dtype).removeprefix('torch.')}"
        yield Contender(name, size, lambda x, i, w=weights: F.linear(x.to(w[i].dtype), w[i]), len(weights))
    for peer in (_int4, _gemlite):
        try:
            yield from peer(N, K, enough)
        except Exception as error:  # a peer that fails must not stop the others
            leave_out(peer.__name__.strip("_"), error)
    for bits in BITS:
        R = mid_features_for(bits, K, N) // 32 * 32
        size = 4 * (R * words_per_row(K) + N * words_per_row(R)) + 2 * (K + R + N)
        layers = [random_device_factors(N, K, bits) for _ in range(enough(size))]
        run = lambda x, i, f=layers: compiled_layer()(x, *f[i].tensors().values())  # noqa: E731
        yield Contender(f"dbf {bits:g} bit", size, run, len(layers))


@functools.cache
def compiled_layer() -> Callable[..., Tensor]:
    """Return a compiled factored layer with interleaved signs; weights are arguments, so that one program serves many."""
    layer = lambda x, *factors: dbf_compile.ops.double_binary_linear(x, *factors, None, x.dtype, True)  # noqa: E731
    return torch.compile(layer, backend="dbf", fullgraph=True, dynamic=False)


def _int4(N: int, K: int, enough: Callable[[int], int]) -> Iterator[Contender]:
    if N % 64 or K % 1024:
        return
    size = N * K // 2 + 4 * N * K // 128
    packed = torch.randint(0, 255, (N, K // 2), dtype=torch.uint8, device=DEVICE)
    weights = [torch.ops.aten._convert_weight_to_int4pack(packed, 8).clone() for _ in range(enough(size))]
    scales = torch.ones(K // 128, N, 2, dtype=torch.bfloat16, device=DEVICE)
    run = lambda x, i: torch.ops.aten._weight_int4pack_mm(x, weights[i], 128, scales)  # noqa: E731
    yield Contender("torch int4", size, run, len(weights))


def _gemlite(N: int, K: int, enough: Callable[[int], int]) -> Iterator[Contender]:
    """Yield two products with GemLite's 1-bit weights, as the two stages of a layer of 2 bits, if it is installed."""
    try:
        from gemlite import DType, GemLiteLinearTriton
    except ImportError:
        return
    if K % 128 or N % 128:
        return
    R = mid_features_for(2.0, K, N) // 128 * 128

    def stage(rows: int, columns: int) -> nn.Module:
        layer = GemLiteLinearTriton(
            W_nbits=1,
            group_size=128,
            in_features=columns,
            out_features=rows,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        signs = torch.randint(0, 2, (rows, columns), dtype=torch.uint8, device=DEVICE)
        groups = (rows * columns // 128, 1)
        scales = torch.full(groups, 2.0, dtype=torch.float16, device=DEVICE)
        layer.pack(signs, scales, torch.full_like(scales, 0.5), None)
        return layer

    size = R * (K + N) // 8 + 4 * R * (K + N) // 128
    pairs = [(stage(R, K), stage(N, R)) for _ in range(enough(size))]
    yield Contender("GemLite 1-bit pair", size, lambda x, i: pairs[i][1](pairs[i][0](x.half())), len(pairs))


def time_layers(arguments: argparse.Namespace) -> None:
    bandwidth = copy_bandwidth()
    print(f"copying memory: {bandwidth:.0f} GB/s")
    rows = []
    for shape in arguments.shapes:
        N, K = map(int, shape.split("x"))
        present = list(contenders(N, K))
        for tokens in arguments.tokens:
            rows += time_layer(shape, present, tokens, arguments.rounds, bandwidth)
        report(f"gpu_layer{arguments.table}", rows)  # after every shape: an error later loses nothing
    print_table(rows)


def time_layer(
    shape: str, present: list[Contender], tokens: int, rounds: int, bandwidth: float
) -> list[dict]:
    """Time all contenders of a shape against each other."""
    torch.compiler.reset()  # else all shapes count as recompilations of one function
    compiled_layer.cache_clear()
    x = torch.randn(tokens, int(shape.split("x")[1]), device=DEVICE, dtype=torch.bfloat16)
    calls: dict[str, tuple[Callable[[int], object], int]] = {}
    kept = {}
    for contender in present:
        if contender.name.startswith("GemLite") and tokens > 1:
            continue  # it would tune itself for each number of tokens, 15 s each
        kept[contender.name] = contender
        # Many tokens take long enough with two weights; few use all.
        calls[contender.name] = (
            lambda index, run=contender.run: run(x, index),
            contender.count if tokens <= 16 else 2,
        )
    with torch.inference_mode():
        medians = interleaved_graphs(calls, rounds)
    rows = []
    for name, median in medians.items():
        rate = kept[name].bytes / median / 1e3
        rows.append(
            {
                "shape": shape,
                "layers": ", ".join(shapes().get(shape, [])),
                "tokens": tokens,
                "contender": name,
                "median_us": round(median, 2),
                "gb_per_s": round(rate),
                "of_copy_bandwidth": round(rate / bandwidth, 3),
                "times_cublas_bf16": round(medians.get("cuBLAS bfloat16", math.nan) / median, 2),
                "rounds": rounds,
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in ({key: key for key in rows[0]}, *rows):
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()))


if __name__ == "__main__":
    main()
