"""The lowering of ``dbf::row_matmul``, the product with a table of quantized rows."""

from __future__ import annotations

from typing import Any

import torch

from dbf_compile.compiler import ir
from dbf_compile.kernels.row_matmul import cpu_kernel
from dbf_compile.kernels.row_matmul.reference import accumulator_dtype


def row_matmul(
    x: Any, rows: Any, bits: int, group: int, bias: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """Lower ``dbf::row_matmul``: on the CPU to a call of the C++ kernel, whose casts Inductor fuses; else to the operator."""
    result = dtype or accumulator_dtype(x.get_dtype())
    on_cpu = x.get_device().type == "cpu" and x.get_dtype() != torch.float64 and 0 not in x.get_size()
    if (
        not on_cpu
        or not cpu_kernel.takes(ir.known_size(x.get_size()[-1]))
        or not ir.can_call(torch.ops.dbf_native.row_matmul.out)
    ):
        return ir.lower_to_operator(
            torch.ops.dbf.row_matmul.default, x, rows, bits, group, bias=bias, dtype=dtype
        )
    tensors = [ir.cast(x, torch.float32), rows]
    if bias is not None:
        tensors.append(ir.cast(bias, torch.float32))
    written = result if result in cpu_kernel.DTYPES else torch.float32
    y = ir.lower_to_out_call(
        torch.ops.dbf_native.row_matmul.out,
        tensors,
        [*x.get_size()[:-1], rows.get_size()[0]],
        written,
        {"bits": bits, "group": group},
    )
    return ir.cast(y, result)
