"""Lowerings of the dbf:: operators: the one door between graphs and kernels."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from dbf_compile import inductor
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import accumulator_dtype


@cache
def register() -> None:
    """Register all lowerings, once per process."""
    inductor.register_lowering(torch.ops.dbf.sign_matmul.default, sign_matmul)


def sign_matmul(x: Any, signs: Any) -> Any:
    """Lower ``dbf::sign_matmul``: to the table look-up kernel on the CPU, to the Triton kernel on a GPU."""
    device, dtype = x.get_device().type, x.get_dtype()
    if dtype != torch.float64 and device == "cuda":
        return _to_triton(x, signs)
    if (
        dtype in cpu_kernel.DTYPES
        and device == "cpu"
        and not inductor.emits_cpp_wrapper()
        and cpu_kernel.available()
    ):
        return inductor.lower_to_out_call(
            torch.ops.dbf_native.sign_matmul.out, (x, signs), _output_size(x, signs), accumulator_dtype(dtype)
        )
    return inductor.lower_to_operator(torch.ops.dbf.sign_matmul.default, x, signs)


def _output_size(x: Any, signs: Any) -> list[Any]:
    return [*x.get_size()[:-1], signs.get_size()[0]]


def _to_triton(x: Any, signs: Any) -> Any:
    from dbf_compile.kernels.sign_matmul import triton_kernel

    x, signs = inductor.contiguous(x, signs)
    *leading, K = x.get_size()
    M, N, K = math.prod(leading), int(signs.get_size()[0]), int(K)
    blocks = triton_kernel.block_sizes(inductor.size_guess(M), N, K)
    return inductor.lower_to_triton_call(
        triton_kernel.sign_matmul_kernel,
        triton_kernel.grid(M, N, blocks, inductor.ceil_div),
        {"x_ptr": x, "signs_ptr": signs, "M": M, "N": N, "K": K, **blocks},
        output="y_ptr",
        size=_output_size(x, signs),
        dtype=torch.float32,
    )
