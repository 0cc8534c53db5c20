"""Derivatives and batching rules of the operators: autograd, forward mode, ``torch.func``.

Both operators are linear in x and in each scale, so every derivative is a product with the same signs again.

``torch.library.register_autograd`` knows neither forward mode, where it loses the tangent without a word, nor ``torch.func``.
A ``torch.autograd.Function`` knows both, and so each operator calls one where derivatives or batches are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.library import Library

from dbf_compile.kernels.sign_matmul.reference import accumulator_dtype


class SignMatmul(Function):
    """``dbf::sign_matmul`` with all derivatives; takes its arguments by position."""

    @staticmethod
    def forward(keys: Any, *args: Any) -> Any:
        """Return the product."""
        return call(torch.ops.dbf.sign_matmul.default, keys, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what derivatives read; of the activations only gradients of scales do."""
        _, x, signs, in_scale, out_scale, bias, ctx.dtype, ctx.interleaved, _ = inputs
        needs_x = any(scale is not None and scale.requires_grad for scale in (in_scale, out_scale))
        ctx.save_for_backward(signs, in_scale, out_scale, x if needs_x else None)
        ctx.save_for_forward(x, signs, in_scale, out_scale)
        ctx.set_materialize_grads(False)  # a tangent of zeros would cost a product
        ctx.cols = x.shape[-1]
        ctx.dtypes = [None if t is None else t.dtype for t in (x, in_scale, out_scale, bias)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, in_scale, out_scale and bias for that of the product."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        signs, in_scale, out_scale, x = ctx.saved_tensors
        x_dtype, in_dtype, out_dtype, bias_dtype = ctx.dtypes
        _, needs_x, _, needs_in, needs_out, needs_bias, *_ = ctx.needs_input_grad
        wide = accumulator_dtype(x_dtype)
        g = grad.to(wide)
        g_bias = _sum_tokens(g).to(bias_dtype) if needs_bias else None
        g_out = None
        if needs_out:
            sums = torch.ops.dbf.sign_matmul(x, signs, in_scale, interleaved=ctx.interleaved)
            g_out = _sum_tokens(g * sums).to(out_dtype)
        g_x = g_in = None
        if needs_x or needs_in:
            g_z = torch.ops.dbf.sign_matmul_transposed(
                g if out_scale is None else g * out_scale.to(wide), signs, ctx.cols, ctx.interleaved
            )
            if needs_in:
                g_in = _sum_tokens(g_z * x.to(wide)).to(in_dtype)
            if needs_x:
                g_x = (g_z if in_scale is None else g_z * in_scale.to(wide)).to(x_dtype)
        return None, g_x, None, g_in, g_out, g_bias, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Return the tangent of the product for those of x, in_scale, out_scale and bias."""
        x, signs, in_scale, out_scale = ctx.saved_for_forward
        _, t_x, _, t_in, t_out, t_bias, *_ = tangents
        wide = accumulator_dtype(x.dtype)

        def product(x: Tensor, in_scale: Tensor | None, out_scale: Tensor | None) -> Tensor:
            y: Tensor = torch.ops.dbf.sign_matmul(
                x, signs, in_scale, out_scale, dtype=wide, interleaved=ctx.interleaved
            )
            return y

        total = torch.zeros((*x.shape[:-1], signs.shape[0]), dtype=wide, device=x.device)
        if t_x is not None:
            total = total + product(t_x, in_scale, out_scale)
        if t_in is not None:
            total = total + product(x, t_in, out_scale)
        if t_out is not None:
            total = total + product(x, in_scale, t_out)
        if t_bias is not None:
            total = total + t_bias.to(wide)
        return total.to(ctx.dtype or wide)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], keys: None, *args: Any) -> tuple[Tensor, int]:
        """Return the products of a batch, and the dimension along which they lie."""
        return batched(torch.ops.dbf.sign_matmul, info.batch_size, in_dims[1:], args)


class SignMatmulTransposed(Function):
    """``dbf::sign_matmul_transposed`` with all derivatives; takes its arguments by position."""

    @staticmethod
    def forward(keys: Any, *args: Any) -> Any:
        """Return the product."""
        return call(torch.ops.dbf.sign_matmul_transposed.default, keys, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the signs."""
        _, g, signs, ctx.cols, ctx.interleaved = inputs
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)
        ctx.dtype = g.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of g for that of the product."""
        (signs,) = ctx.saved_tensors
        g_g = torch.ops.dbf.sign_matmul(grad, signs, interleaved=ctx.interleaved).to(ctx.dtype)
        return None, g_g, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *others: None) -> Any:
        """Return the tangent of the product for that of g."""
        (signs,) = ctx.saved_for_forward
        return torch.ops.dbf.sign_matmul_transposed(tangent, signs, ctx.cols, ctx.interleaved)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], keys: None, *args: Any) -> tuple[Tensor, int]:
        """Return the products of a batch, and the dimension along which they lie."""
        return batched(torch.ops.dbf.sign_matmul_transposed, info.batch_size, in_dims[1:], args)


def register(library: Library, op: Any, function: type[Function]) -> None:
    """Let calls of ``op`` that ask for derivatives or batches go through ``function``.

    Args:
        library: that defines the operator.
        op: takes its tensors by position.
        function: takes a set of dispatch keys, or None, then the arguments of ``op``.
    """

    def autograd(keys: Any, *args: Any) -> Any:
        below = keys.remove(keys.highestPriorityTypeId())  # autograd is done with
        if asked_for([item for item in args if isinstance(item, Tensor)]):
            return function.apply(below, *_with_defaults(op, args))
        return op.redispatch(below, *args)

    def within_torch_func(*args: Any) -> Any:
        return function.apply(None, *_with_defaults(op, args))

    name = op._schema.name
    library.impl(name, autograd, "Autograd", with_keyset=True)
    # While torch.func differentiates or batches, every call goes to this key first.
    library.impl(name, within_torch_func, "FuncTorchDynamicLayerFrontMode")


def _with_defaults(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a call together with those that the dispatcher left out."""
    return (*args, *(argument.default_value for argument in op._schema.arguments[len(args) :]))


def call(op: Any, keys: Any, args: tuple[Any, ...]) -> Any:
    """Call an operator: from the start, or at the first of ``keys``."""
    return op(*args) if keys is None else op.redispatch(keys, *args)


def asked_for(tensors: Sequence[Tensor]) -> bool:
    """Return whether somebody asks for derivatives of what is computed from tensors, one or more."""
    # Out of any dual_level, torch returns the very tensor.
    if forward_ad.unpack_dual(tensors[0]).primal is not tensors[0]:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _sum_tokens(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0)


def batched(
    product: Callable[..., Tensor], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Tensor, int]:
    """Return the products of a batch: one call for a batch of activations, else one each, as for an ensemble of layers."""
    first, *others = in_dims
    if first is not None and not any(dim is not None for dim in others):
        return product(args[0].movedim(first, 0), *args[1:]), 0
    columns = [
        [value] * size if dim is None else value.unbind(dim) for value, dim in zip(args, in_dims, strict=True)
    ]
    return torch.stack([product(*items) for items in zip(*columns, strict=True)]), 0
