"""The operators: schemas, fake implementations, autograd, devices.

    dbf::sign_matmul(x, signs)                    y[..., n] = Σ_k signs[n, k] · x[..., k]
    dbf::sign_matmul_transposed(g, signs, cols)   g_x[..., k] = Σ_n signs[n, k] · g[..., n]

Sums come out in float32 (float64 for float64), whatever the dtype of x: scales, bias and the cast back are
ordinary aten operators around the product, for Inductor to fuse with their neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbf_compile.errors import KernelInputError
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import (
    accumulator_dtype,
)
from dbf_compile.kernels.sign_matmul.reference import (
    sign_matmul as sign_matmul_reference,
)
from dbf_compile.kernels.sign_matmul.reference import (
    sign_matmul_transposed as sign_matmul_transposed_reference,
)
from dbf_compile.signs import words_per_row

_library = torch.library.Library("dbf", "DEF")
_library.define("sign_matmul(Tensor x, Tensor signs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "sign_matmul_transposed(Tensor g, Tensor signs, int cols) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _check(x: Tensor, signs: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise KernelInputError(
            f"activations of dtype {x.dtype} and shape {tuple(x.shape)}",
            "floating point [..., K]",
            "cast the input of the layer",
        )
    if signs.dtype != torch.int32 or signs.dim() != 2 or signs.shape[1] != words_per_row(x.shape[-1]):
        raise KernelInputError(
            f"signs of dtype {signs.dtype} and shape {tuple(signs.shape)} for activations of shape {tuple(x.shape)}",
            f"int32 [N, {words_per_row(x.shape[-1])}]",
            "check that the input has in_features columns",
        )
    if x.device != signs.device:
        raise KernelInputError(
            f"activations on {x.device} and signs on {signs.device}",
            "one device",
            "move the model or its input",
        )


def _default(x: Tensor, signs: Tensor) -> Tensor:
    _check(x, signs)
    return sign_matmul_reference(x, signs)


def _cpu(x: Tensor, signs: Tensor) -> Tensor:
    _check(x, signs)
    if x.dtype in cpu_kernel.DTYPES and cpu_kernel.available():
        return cpu_kernel.sign_matmul_cpu(x, signs)
    return sign_matmul_reference(x, signs)


def _cuda(x: Tensor, signs: Tensor) -> Tensor:
    _check(x, signs)
    if x.dtype == torch.float64:
        return sign_matmul_reference(x, signs)
    from dbf_compile.kernels.sign_matmul.triton_kernel import sign_matmul_triton

    return sign_matmul_triton(x, signs)


def _fake(x: Tensor, signs: Tensor) -> Tensor:
    _check(x, signs)
    return x.new_empty((*x.shape[:-1], signs.shape[0]), dtype=accumulator_dtype(x.dtype))


def _transposed_fake(g: Tensor, signs: Tensor, cols: int) -> Tensor:
    return g.new_empty((*g.shape[:-1], cols), dtype=accumulator_dtype(g.dtype))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, signs = inputs
    ctx.save_for_backward(signs)
    ctx.cols, ctx.dtype = x.shape[-1], x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (signs,) = ctx.saved_tensors
    return torch.ops.dbf.sign_matmul_transposed(grad, signs, ctx.cols).to(ctx.dtype), None


def _save_for_transposed(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    g, signs, _ = inputs
    ctx.save_for_backward(signs)
    ctx.dtype = g.dtype


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (signs,) = ctx.saved_tensors
    return torch.ops.dbf.sign_matmul(grad, signs).to(ctx.dtype), None, None


_library.impl("sign_matmul", _default, "CompositeExplicitAutograd")
_library.impl("sign_matmul", _cpu, "CPU")
_library.impl("sign_matmul", _cuda, "CUDA")
_library.impl("sign_matmul_transposed", sign_matmul_transposed_reference, "CompositeExplicitAutograd")
torch.library.register_fake("dbf::sign_matmul", _fake, lib=_library)
torch.library.register_fake("dbf::sign_matmul_transposed", _transposed_fake, lib=_library)
torch.library.register_autograd("dbf::sign_matmul", _backward, setup_context=_save_for_backward, lib=_library)
torch.library.register_autograd(
    "dbf::sign_matmul_transposed", _transposed_backward, setup_context=_save_for_transposed, lib=_library
)


def double_binary_linear(
    x: Tensor,
    signs_in: Tensor,
    signs_out: Tensor,
    scale_in: Tensor,
    scale_mid: Tensor,
    scale_out: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Apply a factored linear layer; the one place where the two stages and the three scales meet.

    ``y = scale_out ⊙ (signs_out · (scale_mid ⊙ (signs_in · (scale_in ⊙ x)))) + bias``

    Args:
        x: floating point [..., K].
        signs_in: int32 words [R, ceil(K / 32)].
        signs_out: int32 words [N, ceil(R / 32)].
        scale_in: floating point [K].
        scale_mid: floating point [R].
        scale_out: floating point [N].
        bias: floating point [N], or None.
        dtype: dtype of the result; all between is float32 (float64 for float64 ``x``).

    Returns:
        [..., N] of ``dtype``.

    Raises:
        KernelInputError: ``x`` is not floating point, or has another number of columns than ``scale_in``.
    """
    # Multiplying by scale_in would broadcast a single column, and turn whole numbers into floating point ones.
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != scale_in.shape[0]:
        raise KernelInputError(
            f"activations of dtype {x.dtype} and shape {tuple(x.shape)} for in_features={scale_in.shape[0]}",
            f"floating point [..., {scale_in.shape[0]}]",
            "check what feeds the layer",
        )
    wide = accumulator_dtype(x.dtype)
    h = torch.ops.dbf.sign_matmul(x.to(wide) * scale_in.to(wide), signs_in)
    y = torch.ops.dbf.sign_matmul(h * scale_mid.to(wide), signs_out) * scale_out.to(wide)
    result: Tensor = (y if bias is None else y + bias.to(wide)).to(dtype)
    return result
