"""Lowerings of the dbf:: operators: the one door between graphs and kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from dbf_compile import inductor
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.ops import accumulator_dtype


@cache
def register() -> None:
    """Register all lowerings, once per process."""
    inductor.register_lowering(torch.ops.dbf.sign_matmul.default, sign_matmul)


def sign_matmul(x: Any, signs: Any) -> Any:
    """Lower ``dbf::sign_matmul``: to the table look-up kernel on the CPU, to the Triton kernel on a GPU."""
    device, dtype = x.get_device().type, x.get_dtype()
    size = [*x.get_size()[:-1], signs.get_size()[0]]
    if device == "cpu" and dtype in cpu_kernel.DTYPES and cpu_kernel.available() and not inductor.emits_cpp_wrapper():
        op = torch.ops.dbf_native.sign_matmul.out
        return inductor.lower_to_out_call(op, (x, signs), size, accumulator_dtype(dtype))
    return inductor.lower_to_operator(torch.ops.dbf.sign_matmul.default, x, signs)
