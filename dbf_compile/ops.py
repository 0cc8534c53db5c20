"""The operators: schemas, fake implementations, autograd, devices.

    dbf::sign_matmul(x, signs, in_scale?, out_scale?, bias?, dtype?, interleaved, fast)
        y[..., n] = out_scale[n] · Σ_k signs[n, k] · (in_scale[k] · x[..., k]) + bias[n]
    dbf::sign_matmul_transposed(g, signs, cols, interleaved)
        g_x[..., k] = Σ_n signs[n, k] · g[..., n]
    dbf::double_binary_linear(x, signs_in, signs_out, scale_in, scale_mid, scale_out, bias?, dtype?, interleaved, fast)
        sign_matmul twice: compiled graphs call it for a whole layer on the CPU
    dbf::sign_matmul_group(x, signs, in_scale?, fast)
        sign_matmul for several interleaved sign matrices, results side by side: compiled graphs call it for layers of one
        input on GPUs
    dbf::prepared_layers(x, prepared, columns, dtype?, fast)
        double_binary_linear of several layers of one input, results side by side: programs call it on CPUs. The
        C++ kernels' library has it

Sums are as exact as in float32 (float64 for float64 x), whatever the dtype of x; ``fast`` allows a relative error of 1e-4.
On a GPU, more tokens than ``regimes.DECODE_TOKENS`` go through tensor cores. In a 16-bit model these read the scaled
activations in the model's dtype, as for dense layers; above ``regimes.FUSED_TOKENS`` out_scale is rounded to it, too.
``interleaved`` says that the words of signs are interleaved, see :mod:`dbf_compile.signs`; on a GPU, other words are
interleaved at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbf_compile import derivatives
from dbf_compile.errors import KernelInputError
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import accumulator_dtype
from dbf_compile.kernels.sign_matmul.reference import sign_matmul as sign_matmul_reference
from dbf_compile.kernels.sign_matmul.reference import (
    sign_matmul_transposed as sign_matmul_transposed_reference,
)
from dbf_compile.signs import interleave, words_per_row

_library = torch.library.Library("dbf", "DEF")
_library.define(
    "sign_matmul(Tensor x, Tensor signs, Tensor? in_scale=None, Tensor? out_scale=None, Tensor? bias=None, "
    "ScalarType? dtype=None, bool interleaved=False, bool fast=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sign_matmul_transposed(Tensor g, Tensor signs, int cols, bool interleaved=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "double_binary_linear(Tensor x, Tensor signs_in, Tensor signs_out, Tensor scale_in, Tensor scale_mid, "
    "Tensor scale_out, Tensor? bias=None, ScalarType? dtype=None, bool interleaved=False, bool fast=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_library.define(
    "sign_matmul_group(Tensor x, Tensor[] signs, Tensor? in_scale=None, bool fast=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_library.define(
    "prepared_layers(Tensor x, Tensor prepared, int columns, ScalarType? dtype=None, bool fast=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_Vector = Tensor | None


def _check(x: Tensor, signs: Tensor, in_scale: _Vector, out_scale: _Vector, bias: _Vector) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise KernelInputError(
            f"activations of dtype {x.dtype} and shape {tuple(x.shape)}",
            "floating point [..., K]",
            "cast the input of the layer",
        )
    columns = int(x.shape[-1])  # where Dynamo has a symbol, this guards its value
    if in_scale is not None and in_scale.shape != (columns,):
        raise KernelInputError(
            f"activations of shape {tuple(x.shape)} for in_features={in_scale.numel()}",
            f"[..., {in_scale.numel()}]",
            "check the output of the layer before this one",
        )
    if signs.dtype != torch.int32 or signs.dim() != 2 or signs.shape[1] != words_per_row(columns):
        raise KernelInputError(
            f"signs of dtype {signs.dtype} and shape {tuple(signs.shape)} "
            f"for activations of shape {tuple(x.shape)}",
            f"int32 [N, {words_per_row(columns)}]",
            "check that the input has in_features columns"
            if signs.dtype == torch.int32
            else "cast a model with to(dtype), which leaves signs as they are",
        )
    for name, vector in (("out_scale", out_scale), ("bias", bias)):
        if vector is not None and vector.shape != (signs.shape[0],):
            raise KernelInputError(
                f"{name} of shape {tuple(vector.shape)} for {signs.shape[0]} rows of signs",
                f"[{signs.shape[0]}]",
                "take scales and signs from one factorization",
            )
    devices = {tensor.device for tensor in (x, signs, in_scale, out_scale, bias) if tensor is not None}
    if len(devices) > 1:
        raise KernelInputError(
            f"activations on {x.device} and factors on {signs.device}",
            "one device",
            "move the model or its input",
        )


def _default(
    x: Tensor,
    signs: Tensor,
    in_scale: _Vector = None,
    out_scale: _Vector = None,
    bias: _Vector = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Tensor:
    _check(x, signs, in_scale, out_scale, bias)
    return sign_matmul_reference(x, signs, in_scale, out_scale, bias, dtype, interleaved)


def _cpu(
    x: Tensor,
    signs: Tensor,
    in_scale: _Vector = None,
    out_scale: _Vector = None,
    bias: _Vector = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Tensor:
    _check(x, signs, in_scale, out_scale, bias)
    if cpu_kernel.takes(x, in_scale, out_scale, bias) and cpu_kernel.available():
        result = dtype if dtype in cpu_kernel.DTYPES else torch.float32
        y = cpu_kernel.sign_matmul_cpu(x, signs, in_scale, out_scale, bias, result, interleaved, fast)
        return y if dtype is None else y.to(dtype)
    return sign_matmul_reference(x, signs, in_scale, out_scale, bias, dtype, interleaved)


def _cuda(
    x: Tensor,
    signs: Tensor,
    in_scale: _Vector = None,
    out_scale: _Vector = None,
    bias: _Vector = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Tensor:
    _check(x, signs, in_scale, out_scale, bias)
    if x.dtype == torch.float64:
        return sign_matmul_reference(x, signs, in_scale, out_scale, bias, dtype, interleaved)
    from dbf_compile.kernels.sign_matmul.triton_kernel import sign_matmul_triton

    result = dtype if dtype in cpu_kernel.DTYPES else torch.float32
    signs = signs if interleaved else interleave(signs)
    y = sign_matmul_triton(x, signs, in_scale, out_scale, bias, result, fast)
    return y if dtype is None else y.to(dtype)


def _fake(
    x: Tensor,
    signs: Tensor,
    in_scale: _Vector = None,
    out_scale: _Vector = None,
    bias: _Vector = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Tensor:
    features: Any = x.shape[-1] if x.dim() else None
    if in_scale is not None and isinstance(features, torch.SymInt):
        # As for a dense layer, a size that only data will tell is checked when they are there.
        torch.nn.functional.linear(x, x.new_empty((1, in_scale.shape[0])))
    _check(x, signs, in_scale, out_scale, bias)
    return x.new_empty((*x.shape[:-1], int(signs.shape[0])), dtype=dtype or accumulator_dtype(x.dtype))


def _transposed_fake(g: Tensor, signs: Tensor, cols: int, interleaved: bool = False) -> Tensor:
    return g.new_empty((*g.shape[:-1], cols), dtype=accumulator_dtype(g.dtype))


def _group(x: Tensor, signs: list[Tensor], in_scale: _Vector = None, fast: bool = False) -> Tensor:
    return torch.cat(
        [torch.ops.dbf.sign_matmul(x, matrix, in_scale, interleaved=True, fast=fast) for matrix in signs],
        dim=-1,
    )


def _prepared_fake(
    x: Tensor, prepared: Tensor, columns: int, dtype: torch.dtype | None = None, fast: bool = False
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns), dtype=dtype or accumulator_dtype(x.dtype))


_library.impl("sign_matmul", _default, "CompositeExplicitAutograd")
torch.library.register_fake("dbf::prepared_layers", _prepared_fake, lib=_library)
_library.impl("sign_matmul", _cpu, "CPU")
_library.impl("sign_matmul", _cuda, "CUDA")
_library.impl("sign_matmul_transposed", sign_matmul_transposed_reference, "CompositeExplicitAutograd")
torch.library.register_fake("dbf::sign_matmul", _fake, lib=_library)
torch.library.register_fake("dbf::sign_matmul_transposed", _transposed_fake, lib=_library)
derivatives.register(_library, torch.ops.dbf.sign_matmul.default, derivatives.SignMatmul)
derivatives.register(_library, torch.ops.dbf.sign_matmul_transposed.default, derivatives.SignMatmulTransposed)
_library.impl("sign_matmul_group", _group, "CompositeImplicitAutograd")


def double_binary_linear(
    x: Tensor,
    signs_in: Tensor,
    signs_out: Tensor,
    scale_in: Tensor,
    scale_mid: Tensor,
    scale_out: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Tensor:
    """Apply a factored linear layer: two products with signs, and three scales.

    ``y = scale_out ⊙ (signs_out · (scale_mid ⊙ (signs_in · (scale_in ⊙ x)))) + bias``

    Args:
        x: floating point [..., K].
        signs_in: int32 words [R, ceil(K / 32)].
        signs_out: int32 words [N, ceil(R / 32)].
        scale_in: floating point [K].
        scale_mid: floating point [R].
        scale_out: floating point [N].
        bias: floating point [N], or None.
        dtype: of the result; None for float32 (float64 for float64 ``x``). Values between the products are float32 or
            float64, but of 16 bits for many tokens in a compiled 16-bit model on a GPU.
        interleaved: whether the words of both sign matrices are interleaved.
        fast: allow a relative error of 1e-4 if that is faster.

    Returns:
        [..., N] of ``dtype``.

    Raises:
        KernelInputError: ``x`` is not floating point, sizes do not match, or tensors are on several devices.
    """
    if x.is_nested:
        factors = (signs_in, signs_out, scale_in, scale_mid, scale_out)
        return _map_nested(x, lambda x: double_binary_linear(x, *factors, bias, dtype, interleaved, fast))
    # A GPU kernel scales each sum once, before it writes it; the CPU kernel scales activations as it builds its LUTs.
    after, before = (scale_mid, None) if x.device.type == "cuda" else (None, scale_mid)
    h = torch.ops.dbf.sign_matmul(x, signs_in, scale_in, after, interleaved=interleaved, fast=fast)
    result: Tensor = torch.ops.dbf.sign_matmul(
        h, signs_out, before, scale_out, bias, dtype, interleaved, fast
    )
    return result


def prepared_bytes(factors: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> int:
    """Return how many bytes :func:`prepare_layers` takes for these tensors."""
    vectors = [tensor.shape[0] for tensor in (*factors, *biases) if tensor.dim() == 1]
    # A head and an entry for each layer, then vectors on lines of 64 bytes.
    return 32 + 64 * (len(factors) // 5) + sum(4 * int(size) + 64 for size in vectors)


def prepare_layers(
    factors: Sequence[Tensor], biases: Sequence[Tensor] = (), interleaved: bool = True
) -> Tensor:
    """Gather what the CPU kernel needs of layers of one input in one tensor of bytes.

    It has copies of scales and biases, and the addresses of signs: the tensors must stay where and what they are as long as it
    is used.

    Args:
        factors: signs_in, signs_out, scale_in, scale_mid and scale_out of every layer, one layer after the other.
        biases: one a layer, or none at all.
        interleaved: whether the words of signs are interleaved.
    """
    out = torch.empty(prepared_bytes(factors, biases), dtype=torch.uint8)
    return cpu_kernel.prepare_layers_cpu(factors, biases, interleaved, out)


def _map_nested(x: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of the last dimension to a nested tensor."""
    if x.layout != torch.jagged:
        return torch.nested.as_nested_tensor([function(part) for part in x.unbind()])
    x = x.contiguous()
    return torch.nested.nested_tensor_from_jagged(function(x.values()), x.offsets())


# Its derivatives are those of its two products.
_library.impl("double_binary_linear", double_binary_linear, "CompositeImplicitAutograd")
