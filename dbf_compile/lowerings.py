"""Lowerings of the dbf:: operators: the one door between graphs and kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    inductor.register_lowering(torch.ops.dbf.double_binary_linear.default, double_binary_linear)


def double_binary_linear(
    x: Any,
    signs_in: Any,
    signs_out: Any,
    scale_in: Any,
    scale_mid: Any,
    scale_out: Any,
    bias: Any = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Any:
    """Lower ``dbf::double_binary_linear``: on the CPU to one call, elsewhere to its two products."""
    tensors = [scale_in, scale_mid, scale_out, *([] if bias is None else [bias])]
    result = dtype or accumulator_dtype(x.get_dtype())
    if _cpu_kernel_takes(x, result, tensors):
        return inductor.lower_to_out_call(
            torch.ops.dbf_native.double_binary_linear.out,
            (x, signs_in, signs_out, *tensors),
            [*x.get_size()[:-1], signs_out.get_size()[0]],
            result,
            {"interleaved": interleaved, "fast": fast},
        )
    h = sign_matmul(x, signs_in, scale_in, interleaved=interleaved, fast=fast)
    return sign_matmul(h, signs_out, scale_mid, scale_out, bias, dtype, interleaved, fast)


def sign_matmul(
    x: Any,
    signs: Any,
    in_scale: Any = None,
    out_scale: Any = None,
    bias: Any = None,
    dtype: torch.dtype | None = None,
    interleaved: bool = False,
    fast: bool = False,
) -> Any:
    """Lower ``dbf::sign_matmul``: to the table look-up kernel on the CPU, to the Triton kernel on a GPU.

    The C++ kernel takes scales and bias along, on values that it has in registers anyway: as kernels of their own they
    would double the number of C++ kernels to compile. Around the Triton kernel they are Inductor's to fuse.
    """
    wide = accumulator_dtype(x.get_dtype())
    result = dtype or wide
    vectors = [in_scale, out_scale, bias]
    while vectors and vectors[-1] is None:
        vectors.pop()
    # Arguments are given by position: none may be missing in the middle.
    if None not in vectors and _cpu_kernel_takes(x, result, vectors):
        return inductor.lower_to_out_call(
            torch.ops.dbf_native.sign_matmul.out,
            (x, signs, *vectors),
            [*x.get_size()[:-1], signs.get_size()[0]],
            result,
            {"interleaved": interleaved, "fast": fast},
        )
    z = (
        inductor.cast(x, wide)
        if in_scale is None
        else inductor.multiply(inductor.cast(x, wide), inductor.cast(in_scale, wide))
    )
    if x.get_device().type == "cuda" and wide == torch.float32 and not interleaved:
        y = _to_triton(z, signs)
    else:
        y = inductor.lower_to_operator(
            torch.ops.dbf.sign_matmul.default, z, signs, interleaved=interleaved, fast=fast
        )
    if out_scale is not None:
        y = inductor.multiply(y, inductor.cast(out_scale, wide))
    if bias is not None:
        y = inductor.add(y, inductor.cast(bias, wide))
    return inductor.cast(y, result)


def _cpu_kernel_takes(x: Any, result: torch.dtype, vectors: Sequence[Any]) -> bool:
    return (
        x.get_device().type == "cpu"
        and all(
            dtype in cpu_kernel.DTYPES for dtype in (x.get_dtype(), result, *(v.get_dtype() for v in vectors))
        )
        and not inductor.emits_cpp_wrapper()
        and cpu_kernel.available()
    )


def _to_triton(x: Any, signs: Any) -> Any:
    from dbf_compile.kernels.sign_matmul import triton_kernel

    x, signs = inductor.contiguous(x, signs)
    *leading, columns = x.get_size()
    M, N, K = math.prod(leading), int(signs.get_size()[0]), int(columns)
    blocks = triton_kernel.block_sizes(inductor.size_guess(M), N, K)
    return inductor.lower_to_triton_call(
        triton_kernel.sign_matmul_kernel,
        triton_kernel.grid(M, N, blocks, inductor.ceil_div),
        {"x_ptr": x, "signs_ptr": signs, "M": M, "N": N, "K": K, **blocks},
        output="y_ptr",
        size=[*leading, N],
        dtype=torch.float32,
    )
