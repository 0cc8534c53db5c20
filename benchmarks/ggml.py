"""Matrix products of llama.cpp, called in the library inside llama-cpp-python: a peer for bench_cpu.

Weights lie in plain buffers. llama.cpp can re-pack some types at load; that is not used here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q2_K": 10, "Q4_K": 12, "TQ2_0": 35}


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    # The fields behind these stay zero: no callback may end a computation.
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("rest", c_void_p * 4),
    )


class Product(NamedTuple):
    """A product with one of ``count`` equal weights."""

    run: Callable[[int], object]
    count: int
    error: float


def load() -> Any | None:
    """Return the library, or None where llama-cpp-python is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_cpu_init": (None, ()),
        "ggml_init": (c_void_p, (_InitParams,)),
        "ggml_free": (None, (c_void_p,)),
        "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
        "ggml_get_data": (c_void_p, (c_void_p,)),
        "ggml_nbytes": (c_size_t, (c_void_p,)),
        "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
        "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
        "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
        "ggml_graph_plan": (_Plan, (c_void_p, c_int, c_void_p)),
        "ggml_graph_compute": (c_int, (c_void_p, POINTER(_Plan))),
        "ggml_quantize_chunk": (
            c_size_t,
            (c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_cpu_init()
    return library


def make_product(library: Any, type_name: str, x: Tensor, N: int, count: int, threads: int) -> Product:
    """Return ``x [M, K]`` times ``count`` weights [N, K] of a type.

    All weights repeat the same 256 rows, since quantizing takes long and times do not depend on values. The error is
    that of these rows, relative to the rows before rounding.
    """
    M, K = x.shape
    kind = TYPES[type_name]
    size = int(4.6 * N * K) if kind < 2 else N * K
    context = library.ggml_init(
        _InitParams(count * (size + (1 << 16)) + (64 << 20) + 8 * M * (N + K), None, False)
    )
    operand = library.ggml_new_tensor_2d(context, TYPES["F32"], K, M)
    ctypes.memmove(library.ggml_get_data(operand), x.contiguous().data_ptr(), 4 * M * K)
    distinct = torch.randn(min(N, 256), K)
    graphs, results, first = [], [], None
    for _ in range(count):
        tensor = library.ggml_new_tensor_2d(context, kind, K, N)
        data = library.ggml_get_data(tensor)
        if first is None:
            source = ctypes.cast(distinct.data_ptr(), POINTER(c_float))
            row = library.ggml_quantize_chunk(kind, source, data, 0, len(distinct), K, None) // len(distinct)
            for start in range(len(distinct), N, len(distinct)):
                ctypes.memmove(data + start * row, data, min(len(distinct), N - start) * row)
            first = data
        else:
            ctypes.memmove(data, first, library.ggml_nbytes(tensor))
        result = library.ggml_mul_mat(context, tensor, operand)
        graph = library.ggml_new_graph_custom(context, 8, False)
        library.ggml_build_forward_expand(graph, result)
        graphs.append(graph)
        results.append(result)
    plan = library.ggml_graph_plan(graphs[0], threads, None)
    work = ctypes.create_string_buffer(max(1, plan.work_size))
    plan.work_data = ctypes.cast(work, c_void_p)

    def run(index: int) -> int:
        assert work  # keeps the buffer alive
        return int(library.ggml_graph_compute(graphs[index], ctypes.byref(plan)))

    weakref.finalize(run, library.ggml_free, context)  # frees the weights with the last reader
    run(0)
    y = torch.empty(M, N)
    ctypes.memmove(y.data_ptr(), library.ggml_get_data(results[0]), 4 * M * N)
    truth = x.double() @ distinct.double().T
    error = (y[:, : len(distinct)].double() - truth).norm() / truth.norm()
    return Product(run, count, float(error))
