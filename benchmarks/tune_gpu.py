"""One NVIDIA GPU: the kernel for few tokens under many launch settings, to choose the defaults of ``decode_blocks`` from.

    python benchmarks/tune_gpu.py                                     the products of Llama-2-7B at 1 and 2 bits
    python benchmarks/tune_gpu.py --shapes 4096x4096 --tokens 1 8     others, rows x columns of the sign matrix

Products run inside CUDA graphs, each on the next of so many matrices that none is in the cache; settings take turns.
Beside them stands cuBLAS with a dense bfloat16 matrix of the same size. Settings compile first, in several processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import gpu, interleaved_graphs, versions
from measure import commit, write_results
from torch import Tensor
from triton.runtime import OutOfResources

from dbf_compile.factors import mid_features_for
from dbf_compile.kernels.sign_matmul.triton_decode import (
    decode_blocks,
    decode_grid,
    decode_kernel,
    decode_parts,
)
from dbf_compile.signs import words_per_row

LAYERS = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  # of Llama-2-7B, fused, N x K
Job = tuple[int, int, int, dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in shapes()])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each setting")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run this on a machine with one")
    print(f"{gpu()}; {versions()}; commit {commit()}", flush=True)
    sizes = [(M, *map(int, shape.split("x"))) for M in arguments.tokens for shape in arguments.shapes]
    jobs = [(M, N, K, settings) for M, N, K in sizes for settings in candidates(M, N, K)]
    # Each process has the device open, which takes some of its memory.
    count = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_job, jobs))
    rows = []
    for size in sizes:
        rows += time_shape(size, [settings for *shape, settings in jobs if tuple(shape) == size], arguments)
    common = {"gpu": gpu(), "gpu_versions": versions()}
    print(f"written to {write_results('gpu_tuning', [{**row, **common} for row in rows])}")


def shapes() -> list[tuple[int, int]]:
    """Return both stages of all layers at 1 and 2 bits."""
    found = []
    for bits in (1.0, 2.0):
        for N, K in LAYERS:
            R = mid_features_for(bits, K, N) // 32 * 32
            found += [(R, K), (N, R)]
    return found


def candidates(M: int, N: int, K: int) -> list[dict[str, int]]:
    """Return all settings that are worth trying, for columns in one part, in the default number, and one step a part."""
    steps = -(-words_per_row(K) // 32)
    every = {1, decode_parts(M, N, K), steps if M == 1 else 1}
    return [settings for parts in sorted(every) for settings in decode_blocks(M, N, K, parts)]


def launch(x: Tensor, words: Tensor, y: Tensor, N: int, K: int, settings: dict[str, Any]) -> None:
    M = x.shape[0]
    decode_kernel[decode_grid(M, N, settings)](x, words, y, None, None, None, M, N, K, **settings)


def compile_job(job: Job) -> None:
    M, N, K, settings = job
    x, words = torch.zeros(M, K, device="cuda"), random_words(N, K)
    with suppress(OutOfResources):  # said when it is timed
        launch(x, words, results(M, N, settings), N, K, settings)
    torch.cuda.synchronize()


def random_words(N: int, K: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (N, words_per_row(K)), dtype=torch.int32, device="cuda")


def results(M: int, N: int, settings: dict[str, int]) -> Tensor:
    return torch.empty(settings["PARTS"], M, N, device="cuda")


def time_shape(size: tuple[int, int, int], every: list[dict[str, int]], arguments: Any) -> list[dict]:
    """Time all settings of a shape, and cuBLAS, against each other."""
    M, N, K = size
    many = lambda bytes: max(2, (192 << 20) // bytes)  # noqa: E731
    x = torch.randn(M, K, device="cuda")
    narrow = x.bfloat16()
    words = [random_words(N, K) for _ in range(many(4 * N * words_per_row(K)))]
    dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(many(2 * N * K))]
    calls: dict[str, tuple[Any, int]] = {"cuBLAS": (lambda index: F.linear(narrow, dense[index]), len(dense))}
    for number, settings in enumerate(every):
        y = results(M, N, settings)
        call = lambda index, y=y, one=settings: launch(x, words[index], y, N, K, one)  # noqa: E731
        calls[str(number)] = (call, len(words))
    medians = interleaved_graphs(calls, arguments.rounds)
    rows = [
        {
            "tokens": M,
            "rows_x_columns": f"{N}x{K}",
            "tile": "x".join(str(settings[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_W")),
            "parts": settings["PARTS"],
            "warps": settings["num_warps"],
            "default": settings == decode_blocks(M, N, K, settings["PARTS"])[0],
            "median_us": round(medians[str(number)], 2),
            "cublas_bf16_us": round(medians["cuBLAS"], 2),
        }
        for number, settings in enumerate(every)
        if str(number) in medians
    ]
    for row in sorted(rows, key=lambda row: row["median_us"]):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
