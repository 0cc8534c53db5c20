"""One NVIDIA GPU: the kernels under many launch settings, to choose the defaults of ``decode_blocks`` and
``prefill_blocks``, and the numbers of tokens at which one kernel replaces another.

    python benchmarks/tune_gpu.py                                        one token, the products of Llama-2-7B at 1 and 2 bits
    python benchmarks/tune_gpu.py --shapes 4096x4096 --tokens 4 16 64    others, rows x columns of the sign matrix
    python benchmarks/tune_gpu.py --dry-run                              a small one on the CPU, no times

"tables" is the kernel for few tokens, "tensor cores" the one for many, "dequantized" cuBLAS with a dense matrix of the
signs. Products run inside CUDA graphs. Each uses the next of many matrices, so that none is in the cache; settings take
turns. cuBLAS with a dense bfloat16 matrix of the same size is the peer. Settings compile first, in several processes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

from gpu_timing import DEVICE, DRY_RUN, announce, interleaved_graphs, report, synchronize

# isort: split
import torch
import torch.nn.functional as F
from gpu_models import layers
from torch import Tensor
from triton.runtime import OutOfResources

from dbf_compile.factors import mid_features_for
from dbf_compile.kernels.sign_matmul.regimes import DECODE_TOKENS
from dbf_compile.kernels.sign_matmul.triton_decode import (
    choose_split_k,
    decode_blocks,
    decode_grid,
    decode_kernel,
)
from dbf_compile.kernels.sign_matmul.triton_dequantize import dequantize
from dbf_compile.kernels.sign_matmul.triton_prefill import (
    prefill_blocks,
    prefill_grid,
    prefill_kernel,
)
from dbf_compile.signs import is_ragged, words_per_row

SMALL_SHAPE, SMALL_TOKENS = "35x1060", (1, 3, 20)
Job = tuple[int, int, int, dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in shapes()])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=9, help="timings of each setting")
    parser.add_argument("--dry-run", action="store_true", help="a small shape on the CPU, no times")
    arguments = parser.parse_args()
    if DRY_RUN:
        arguments.shapes, arguments.tokens, arguments.rounds = [SMALL_SHAPE], SMALL_TOKENS, 1
    announce()
    sizes = [(M, *map(int, shape.split("x"))) for M in arguments.tokens for shape in arguments.shapes]
    jobs = [(M, N, K, settings) for M, N, K in sizes for settings in candidates(M, N, K)]
    # Few processes: each opens the device, which takes some of its memory.
    count = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_job, jobs))
    rows = []
    for size in sizes:
        rows += time_shape(size, [settings for *shape, settings in jobs if tuple(shape) == size], arguments)
        report("gpu_tuning", rows)  # after every shape: an error later loses nothing


def shapes() -> list[tuple[int, int]]:
    """Return rows and columns of both stages of all layers, at 1 and 2 bits."""
    stages = []
    for bits in (1.0, 2.0):
        for N, K in layers("llama-2-7b").values():
            R = mid_features_for(bits, K, N) // 32 * 32
            stages += [(R, K), (N, R)]
    return stages


def candidates(M: int, N: int, K: int) -> list[dict[str, int]]:
    """Return all settings that are worth trying: of tables for columns in one part, in few, and one step a part."""
    if M > DECODE_TOKENS:
        return [*prefill_blocks(M, N), {}]
    steps = -(-words_per_row(K) // 32)
    every = {1, 2, 4, choose_split_k(M, N, K), steps} if M == 1 else {1}
    tables = [settings for parts in sorted(every) for settings in decode_blocks(M, N, K, parts)]
    return tables if M == 1 else [*tables, *prefill_blocks(M, N)]


def kernel_of(settings: dict[str, int]) -> str:
    return "tables" if "BLOCK_W" in settings else "tensor cores" if settings else "dequantized"


def launch(x: Tensor, words: Tensor, y: Tensor, N: int, K: int, settings: dict[str, Any]) -> None:
    """Launch the kernel of these settings; x is float32 for tables, bfloat16 for the others."""
    M, ragged = x.shape[0], is_ragged(N)
    match kernel_of(settings):
        case "tables":
            decode_kernel[decode_grid(M, N, settings)](
                x, words, y, None, None, None, M, N, K, RAGGED=ragged, **settings
            )
        case "tensor cores":
            prefill_kernel[prefill_grid(M, N, settings)](
                x, words, y, None, None, M, N, K, 1, ragged, **settings
            )
        case _:
            F.linear(x, dequantize(words, None, K, x.dtype))


def activations(M: int, K: int, settings: dict[str, int]) -> Tensor:
    """Return activations [M, K] as a compiled 16-bit model has them: float32 for tables, whose producer leaves float32 sums."""
    return torch.randn(M, K, device=DEVICE, dtype=torch.float32 if "BLOCK_W" in settings else torch.bfloat16)


def compile_job(job: Job) -> None:
    M, N, K, settings = job
    with suppress(OutOfResources):  # reported when it is timed
        launch(activations(M, K, settings), random_words(N, K), results(M, N, settings), N, K, settings)
    synchronize()


def random_words(N: int, K: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (N, words_per_row(K)), dtype=torch.int32, device=DEVICE)


def results(M: int, N: int, settings: dict[str, int]) -> Tensor:
    return torch.empty(settings.get("SPLIT_K", 1), M, N, device=DEVICE)


def time_shape(size: tuple[int, int, int], every: list[dict[str, int]], arguments: Any) -> list[dict]:
    """Time all settings of a shape and cuBLAS against each other; print and return a row per setting."""
    M, N, K = size
    many = lambda bytes: 2 if DRY_RUN else max(2, (192 << 20) // bytes)  # noqa: E731
    narrow = activations(M, K, {})
    words = [random_words(N, K) for _ in range(many(4 * N * words_per_row(K)))]
    dense = [torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(many(2 * N * K))]
    calls: dict[str, tuple[Any, int]] = {"cuBLAS": (lambda index: F.linear(narrow, dense[index]), len(dense))}
    for number, settings in enumerate(every):
        x, y = activations(M, K, settings), results(M, N, settings)
        call = lambda index, x=x, y=y, one=settings: launch(x, words[index], y, N, K, one)  # noqa: E731
        calls[str(number)] = (call, len(words))
    medians = interleaved_graphs(calls, arguments.rounds)
    defaults = [{}, prefill_blocks(M, N)[0]]
    defaults += [decode_blocks(M, N, K, parts)[0] for parts in (1, choose_split_k(M, N, K))]
    rows = [
        {
            "tokens": M,
            "rows_x_columns": f"{N}x{K}",
            "kernel": kernel_of(settings),
            "tile": "x".join(str(value) for name, value in settings.items() if name.startswith("BLOCK")),
            "parts": settings.get("SPLIT_K", 1),
            "warps": settings.get("num_warps", ""),
            "stages": settings.get("num_stages", ""),
            "default": settings in defaults,
            "median_us": round(medians[str(number)], 2),
            "cublas_bf16_us": round(medians.get("cuBLAS", math.nan), 2),
        }
        for number, settings in enumerate(every)
        if str(number) in medians
    ]
    for row in sorted(rows, key=lambda row: row["median_us"]):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
