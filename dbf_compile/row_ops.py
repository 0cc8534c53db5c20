"""The operators of tables of quantized rows: schemas, fake implementations, derivatives, devices.

    dbf::row_matmul(x, rows, bits, group, bias?, dtype?)
        y[..., n] = Σ_k W[n, k] · x[..., k] + bias[n]
    dbf::row_matmul_transposed(g, rows, columns, bits, group)
        g_x[..., k] = Σ_n W[n, k] · g[..., n]

W is the matrix that the table stands for, see :mod:`dbf_compile.rows`. Sums are as exact as in float32 (float64 for float64 x).
A C++ kernel computes the first on CPUs; elsewhere the table is written out, a part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dbf_compile import derivatives
from dbf_compile.errors import KernelInputError
from dbf_compile.kernels.row_matmul import cpu_kernel
from dbf_compile.kernels.row_matmul.reference import accumulator_dtype
from dbf_compile.kernels.row_matmul.reference import row_matmul as row_matmul_reference
from dbf_compile.kernels.row_matmul.reference import row_matmul_transposed as row_matmul_transposed_reference
from dbf_compile.rows import RowFormat

_library = torch.library.Library("dbf", "FRAGMENT")
_library.define(
    "row_matmul(Tensor x, Tensor rows, int bits, int group, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "row_matmul_transposed(Tensor g, Tensor rows, int columns, int bits, int group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x: Tensor, rows: Tensor, form: RowFormat, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise KernelInputError(
            f"activations of dtype {x.dtype} and shape {tuple(x.shape)}",
            "floating point [..., K]",
            "cast the input of the layer",
        )
    columns = int(x.shape[-1])  # where Dynamo has a symbol, this guards its value
    if rows.dtype != torch.int32 or rows.dim() != 2 or rows.shape[1] != form.words(columns):
        raise KernelInputError(
            f"a table of dtype {rows.dtype} and shape {tuple(rows.shape)} for activations of shape {tuple(x.shape)}",
            f"int32 [N, {form.words(columns)}]",
            "check that the input has in_features columns",
        )
    if bias is not None and bias.shape != (rows.shape[0],):
        raise KernelInputError(
            f"bias of shape {tuple(bias.shape)} for a table of {rows.shape[0]} rows",
            f"[{rows.shape[0]}]",
            "take bias and table from one layer",
        )
    if len({tensor.device for tensor in (x, rows, bias) if tensor is not None}) > 1:
        raise KernelInputError(
            f"activations on {x.device} and a table on {rows.device}",
            "one device",
            "move the model or its input",
        )


def _default(
    x: Tensor,
    rows: Tensor,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    form = RowFormat(bits, group)
    _check(x, rows, form, bias)
    return row_matmul_reference(x, rows, bias, form, dtype)


def _cpu(
    x: Tensor,
    rows: Tensor,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    form = RowFormat(bits, group)
    _check(x, rows, form, bias)
    if x.dtype == torch.float64 or not cpu_kernel.takes(x.shape[-1]):
        return row_matmul_reference(x, rows, bias, form, dtype)
    return cpu_kernel.row_matmul_cpu(x, rows, bias, form, dtype or torch.float32)


def _fake(
    x: Tensor,
    rows: Tensor,
    bits: int,
    group: int,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check(x, rows, RowFormat(bits, group), bias)
    return x.new_empty((*x.shape[:-1], int(rows.shape[0])), dtype=dtype or accumulator_dtype(x.dtype))


def _transposed(g: Tensor, rows: Tensor, columns: int, bits: int, group: int) -> Tensor:
    return row_matmul_transposed_reference(g, rows, columns, RowFormat(bits, group))


def _transposed_fake(g: Tensor, rows: Tensor, columns: int, bits: int, group: int) -> Tensor:
    return g.new_empty((*g.shape[:-1], columns), dtype=accumulator_dtype(g.dtype))


class RowMatmul(Function):
    """``dbf::row_matmul`` with all derivatives; takes its arguments by position."""

    @staticmethod
    def forward(keys: Any, *args: Any) -> Any:
        """Return the product."""
        return derivatives.call(torch.ops.dbf.row_matmul.default, keys, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the table."""
        _, x, rows, ctx.bits, ctx.group, bias, ctx.dtype = inputs
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and bias for that of the product."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        (rows,) = ctx.saved_tensors
        _, needs_x, _, _, _, needs_bias, _ = ctx.needs_input_grad
        g = grad.to(accumulator_dtype(ctx.x_dtype))
        g_x = g_bias = None
        if needs_x:
            g_x = torch.ops.dbf.row_matmul_transposed(g, rows, ctx.shape[-1], ctx.bits, ctx.group).to(
                ctx.x_dtype
            )
        if needs_bias:
            g_bias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
        return None, g_x, None, None, None, g_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Return the tangent of the product for those of x and bias."""
        (rows,) = ctx.saved_for_forward
        _, t_x, _, _, _, t_bias, _ = tangents
        wide = accumulator_dtype(ctx.x_dtype)
        total = torch.zeros((*ctx.shape[:-1], rows.shape[0]), dtype=wide, device=rows.device)
        if t_x is not None:
            total = total + torch.ops.dbf.row_matmul(t_x, rows, ctx.bits, ctx.group, dtype=wide)
        if t_bias is not None:
            total = total + t_bias.to(wide)
        return total.to(ctx.dtype or wide)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], keys: None, *args: Any) -> tuple[Tensor, int]:
        """Return the products of a batch, and the dimension along which they lie."""
        return derivatives.batched(torch.ops.dbf.row_matmul, info.batch_size, in_dims[1:], args)


class RowMatmulTransposed(Function):
    """``dbf::row_matmul_transposed`` with all derivatives; takes its arguments by position."""

    @staticmethod
    def forward(keys: Any, *args: Any) -> Any:
        """Return the product."""
        return derivatives.call(torch.ops.dbf.row_matmul_transposed.default, keys, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the table."""
        _, g, rows, ctx.columns, ctx.bits, ctx.group = inputs
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)
        ctx.dtype = g.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of g for that of the product."""
        (rows,) = ctx.saved_tensors
        g_g = torch.ops.dbf.row_matmul(grad, rows, ctx.bits, ctx.group).to(ctx.dtype)
        return None, g_g, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *others: None) -> Any:
        """Return the tangent of the product for that of g."""
        (rows,) = ctx.saved_for_forward
        return torch.ops.dbf.row_matmul_transposed(tangent, rows, ctx.columns, ctx.bits, ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], keys: None, *args: Any) -> tuple[Tensor, int]:
        """Return the products of a batch, and the dimension along which they lie."""
        return derivatives.batched(torch.ops.dbf.row_matmul_transposed, info.batch_size, in_dims[1:], args)


_library.impl("row_matmul", _default, "CompositeExplicitAutograd")
_library.impl("row_matmul", _cpu, "CPU")
_library.impl("row_matmul_transposed", _transposed, "CompositeExplicitAutograd")
torch.library.register_fake("dbf::row_matmul", _fake, lib=_library)
torch.library.register_fake("dbf::row_matmul_transposed", _transposed_fake, lib=_library)
derivatives.register(_library, torch.ops.dbf.row_matmul.default, RowMatmul)
derivatives.register(_library, torch.ops.dbf.row_matmul_transposed.default, RowMatmulTransposed)
