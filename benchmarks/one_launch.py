"""One NVIDIA GPU: the cost of launching a layer's second stage, and three ways to hide it.

    python benchmarks/one_launch.py              layers of Llama-2-7B at 2 bits, one token
    python benchmarks/one_launch.py --dry-run    the same computation on small layers, in Triton's interpreter

An experiment, not a part of the library. The contenders:

    two launches     as the library does it: the second kernel starts when the first has ended
    early            the second kernel is launched early (programmatic dependent launch), reads its signs, then waits
    all early        the first kernel is launched early as well, behind the second one of the layer before
    one launch       a persistent kernel for both stages; it reads the signs of the second before a barrier of the grid

In all of them a program adds up 32 x BLOCK_W columns, and the next stage adds the parts of a row, as choose_split_k prefers.
Times are those of CUDA graphs with so many layers that no signs are in the cache: the device's time for one layer, and
the host's for launching the graph, which early launches can make expensive. Results are checked against the reference
first. A barrier of the grid needs every program to be resident, so that launch is cooperative.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_timing import DEVICE, DRY_RUN, announce, milliseconds, report

# isort: split
import torch
import triton
import triton.language as tl
from gpu_models import layers
from torch import Tensor

from dbf_compile.factors import mid_features_for
from dbf_compile.kernels.sign_matmul.triton_common import first_words
from dbf_compile.kernels.sign_matmul.triton_decode import build_lut, load_words, look_up
from dbf_compile.signs import deinterleave, unpack_signs, words_per_row

SMALL_LAYERS = ((208, 1100), (96, 64))
BLOCK_N, BLOCK_W, WARPS = 32, 32, 8
WAYS = ("two launches", "early", "all early", "one launch")


@triton.jit
def signs_of(signs_ptr, unit, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Load the words of unit ``unit`` of a stage, [BLOCK_W, BLOCK_N]; N is a multiple of 16."""
    W: tl.constexpr = (K + 31) // 32
    SPLIT_K: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    n = (unit // SPLIT_K) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = (unit % SPLIT_K) * BLOCK_W + tl.arange(0, BLOCK_W)
    rows, apart = first_words(signs_ptr, n, N, W, False)
    return load_words(rows, apart, w, (w[:, None] < W) & (n[None, :] < N), BLOCK_N, BLOCK_W)


@triton.jit
def add_up(  # noqa: PLR0913  a kernel
    x_ptr, scale_ptr, words, y_ptr, unit, N, K: tl.constexpr, X_SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Store what a unit adds to y, float32 [SPLIT_K, N]; x is the sum of X_SPLIT_K rows [X_SPLIT_K, K], times a scale."""
    W: tl.constexpr = (K + 31) // 32
    SPLIT_K: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    part = unit % SPLIT_K
    tables = build_lut(x_ptr, scale_ptr, 0, part * BLOCK_W * 32, 1, K, 1, BLOCK_W * 32, X_SPLIT_K)
    y = tl.sum(tl.sum(look_up(tables, words, 1, BLOCK_N, BLOCK_W), axis=1), axis=0)
    n = (unit // SPLIT_K) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + part * N + n, y, mask=n < N)


@triton.jit
def stage_kernel(  # noqa: PLR0913  a kernel
    x_ptr, signs_ptr, scale_ptr, y_ptr, N, K: tl.constexpr, X_SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    WAITS: tl.constexpr, TELLS: tl.constexpr,
):  # fmt: skip
    """Compute one unit of a stage per program.

    Args:
        WAITS: this kernel is launched early, and reads x only after the kernel before has ended.
        TELLS: the next kernel may be launched early.
    """
    unit = tl.program_id(0)
    words = signs_of(signs_ptr, unit, N, K, BLOCK_N, BLOCK_W)
    if TELLS:
        tl.extra.cuda.gdc_launch_dependents()
    if WAITS:
        tl.extra.cuda.gdc_wait()
    add_up(x_ptr, scale_ptr, words, y_ptr, unit, N, K, X_SPLIT_K, BLOCK_N, BLOCK_W)


@triton.jit
def layer_kernel(  # noqa: PLR0913  a kernel
    x_ptr, signs_in_ptr, h_ptr, scale_mid_ptr, signs_out_ptr, y_ptr, arrived_ptr, R: tl.constexpr, N, K: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Compute both stages, with a barrier between them; an interpreter, which runs programs in sequence, takes one at a time.

    Args:
        h_ptr: float32 [SPLIT_K of the first stage, R].
        arrived_ptr: int32, 0 before the first launch: number of programs that reached the barrier, in all launches.
    """
    PARTS_IN: tl.constexpr = ((K + 31) // 32 + BLOCK_W - 1) // BLOCK_W
    PARTS_OUT: tl.constexpr = ((R + 31) // 32 + BLOCK_W - 1) // BLOCK_W
    program = tl.program_id(0)
    if FIRST:
        for unit in range(program, tl.cdiv(R, BLOCK_N) * PARTS_IN, PROGRAMS):
            words = signs_of(signs_in_ptr, unit, R, K, BLOCK_N, BLOCK_W)
            add_up(x_ptr, None, words, h_ptr, unit, R, K, 1, BLOCK_N, BLOCK_W)
    words = signs_of(signs_out_ptr, program, N, R, BLOCK_N, BLOCK_W)
    if FIRST and SECOND:
        tl.debug_barrier()  # all threads have stored; the addition below makes that visible
        before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        goal = before - before % PROGRAMS + PROGRAMS  # so no launch has to reset the counter
        while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < goal:
            pass
        tl.debug_barrier()
    if SECOND:
        for unit in range(program, tl.cdiv(N, BLOCK_N) * PARTS_OUT, PROGRAMS):
            following = signs_of(signs_out_ptr, unit + PROGRAMS, N, R, BLOCK_N, BLOCK_W)
            add_up(h_ptr, scale_mid_ptr, words, y_ptr, unit, N, R, PARTS_IN, BLOCK_N, BLOCK_W)
            words = following


class Layer(NamedTuple):
    """A layer of random factors, with activations and results of one token."""

    x: Tensor  # [1, K]
    signs_in: Tensor  # int32 [R, words of K], interleaved
    scale_mid: Tensor  # [R]
    signs_out: Tensor  # int32 [N, words of R], interleaved
    h: Tensor  # [parts of K, R]
    y: Tensor  # [parts of R, N]

    @classmethod
    def random(cls, N: int, K: int, R: int) -> Layer:
        words = lambda rows, columns: torch.randint(  # noqa: E731
            -(2**31), 2**31, (rows, words_per_row(columns)), dtype=torch.int32, device=DEVICE
        )
        poisoned = lambda rows, columns: torch.full((rows, columns), torch.nan, device=DEVICE)  # noqa: E731
        return cls(
            torch.randn(1, K, device=DEVICE),
            words(R, K),
            torch.rand(R, device=DEVICE) + 0.5,
            words(N, R),
            poisoned(parts(K), R),
            poisoned(parts(R), N),
        )

    def error(self) -> float:
        """Return the error of y relative to float64."""
        K, R = self.x.shape[1], self.scale_mid.shape[0]
        first, second = (
            unpack_signs(deinterleave(words), columns, torch.float64).T
            for words, columns in ((self.signs_in, K), (self.signs_out, R))
        )
        exact = (self.x.double() @ first * self.scale_mid.double()) @ second
        return float((self.y.double().sum(0) - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each way")
    arguments = parser.parse_args()
    announce()
    rows = []
    for N, K in SMALL_LAYERS if DRY_RUN else layers("llama-2-7b").values():
        R = 80 if DRY_RUN else mid_features_for(2.0, K, N) // 32 * 32
        for way in ways():
            layer = Layer.random(N, K, R)
            runner(layer, way, 3 if DRY_RUN else programs(layer, 2))()
            # Sums in float32 of up to 11008 terms: a few of their last bits.
            if not (error := layer.error()) < 1e-5:
                raise SystemExit(f"{N}x{K}, {way}: relative error {error}")
        print(f"{N}x{K}: all ways agree with the reference", flush=True)
        if not DRY_RUN:
            rows += time_layer(N, K, R, arguments.rounds)
    report("gpu_one_launch", rows)


def ways() -> list[str]:
    """Return the ways that this device supports: early launches need sm_90."""
    early = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
    return [way for way in WAYS if early or "early" not in way]


def parts(columns: int) -> int:
    return -(-words_per_row(columns) // BLOCK_W)


def units(rows: int, columns: int) -> int:
    return -(-rows // BLOCK_N) * parts(columns)


def programs(layer: Layer, each: int) -> int:
    """Return the number of persistent programs, ``each`` per multiprocessor, at most one per unit."""
    K, R, N = layer.x.shape[1], layer.scale_mid.shape[0], layer.y.shape[1]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return min(each * multiprocessors, max(units(R, K), units(N, R)))


def runner(layer: Layer, way: str, resident: int) -> Callable[[], None]:
    """Return a function that launches a layer in one of the ways."""
    K, R, N = layer.x.shape[1], layer.scale_mid.shape[0], layer.y.shape[1]
    on_gpu = layer.x.is_cuda
    if way == "one launch":
        arrived = torch.zeros(1, dtype=torch.int32, device=layer.x.device)
        phases = [(True, True)] if on_gpu else [(True, False), (False, True)]
        options: dict[str, Any] = {"launch_cooperative_grid": True} if on_gpu else {}

        def both() -> None:
            for first, second in phases:
                layer_kernel[(resident,)](
                    layer.x, layer.signs_in, layer.h, layer.scale_mid, layer.signs_out, layer.y, arrived, R, N, K,
                    resident, BLOCK_N, BLOCK_W, first, second, num_warps=WARPS, **options,
                )  # fmt: skip

        return both
    first_early, second_early = on_gpu and way == "all early", on_gpu and way != "two launches"
    early = lambda is_early: {"launch_pdl": True} if is_early else {}  # noqa: E731

    def two() -> None:
        stage_kernel[(units(R, K),)](
            layer.x, layer.signs_in, None, layer.h, R, K, 1, BLOCK_N, BLOCK_W,
            first_early, second_early, num_warps=WARPS, **early(first_early),
        )  # fmt: skip
        stage_kernel[(units(N, R),)](
            layer.h, layer.signs_out, layer.scale_mid, layer.y, N, R, parts(K), BLOCK_N, BLOCK_W,
            second_early, first_early, num_warps=WARPS, **early(second_early),
        )  # fmt: skip

    return two


def time_layer(N: int, K: int, R: int, rounds: int) -> list[dict[str, Any]]:
    """Time all ways in turn, the persistent kernel with one, two and four programs per multiprocessor."""
    bytes_of_signs = 4 * (R * words_per_row(K) + N * words_per_row(R))
    layers = [Layer.random(N, K, R) for _ in range(max(16, (192 << 20) // bytes_of_signs))]
    cases = [(way, each) for way in ways() for each in ((1, 2, 4) if way == "one launch" else (0,))]
    graphs = {}
    for way, each in cases:
        calls = [runner(layer, way, programs(layer, each)) for layer in layers]
        try:
            calls[0]()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception as error:
            print(f"{way}, {each}: left out, {str(error).splitlines()[0]}", flush=True)
            continue
        graphs[way, each] = graph, calls  # keeps the counters of the calls alive
    device: dict[Any, list[float]] = {case: [] for case in graphs}
    host: dict[Any, list[float]] = {case: [] for case in graphs}
    for _ in range(rounds):
        for case, (graph, _) in graphs.items():
            device[case].append(1e3 * milliseconds(graph.replay) / len(layers))
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            host[case].append(1e6 * (time.perf_counter() - start))
            torch.cuda.synchronize()
    rows = [
        {
            "layer": f"{N}x{K}",
            "mid_features": R,
            "way": way,
            "programs_each": each or "",
            "device_us_a_layer": round(statistics.median(device[way, each]), 2),
            "host_us_a_graph": round(statistics.median(host[way, each]), 1),
            "layers_in_graph": len(layers),
        }
        for way, each in graphs
    ]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
