"""Lowerings of the dbf:: operators: the one door between graphs and kernels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from dbf_compile.compiler import ir
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import DECODE_TOKENS, FUSED_TOKENS, accumulator_dtype
from dbf_compile.signs import is_ragged

_PRODUCTS = (torch.ops.dbf.sign_matmul.default, torch.ops.dbf.sign_matmul_group.default)


@cache
def register() -> None:
    """Register all lowerings, once per process."""
    ir.register_lowering(torch.ops.dbf.sign_matmul.default, sign_matmul)
    ir.register_lowering(torch.ops.dbf.double_binary_linear.default, double_binary_linear)
    ir.register_lowering(torch.ops.dbf.sign_matmul_group.default, sign_matmul_group)


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
        return ir.lower_to_out_call(
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
    """Lower ``dbf::sign_matmul``: to the table look-up kernel on the CPU, to one of the Triton kernels on a GPU.

    The C++ kernel takes scales and bias along, on values that it has in registers anyway: as kernels of their own they
    would double the number of C++ kernels to compile. Into the Triton kernels Inductor fuses out_scale, bias and what
    follows; in_scale is for few tokens the kernel's where it cannot be part of what comes before, as it is for many.
    """
    wide = accumulator_dtype(x.get_dtype())
    result = dtype or wide
    vectors = [in_scale, out_scale, bias]
    while vectors and vectors[-1] is None:
        vectors.pop()
    # Arguments are given by position: none may be missing in the middle.
    if None not in vectors and _cpu_kernel_takes(x, result, vectors):
        return ir.lower_to_out_call(
            torch.ops.dbf_native.sign_matmul.out,
            (x, signs, *vectors),
            [*x.get_size()[:-1], signs.get_size()[0]],
            result,
            {"interleaved": interleaved, "fast": fast},
        )
    tokens = math.prod(x.get_size()[:-1])
    few, fused = (ir.known_at_most(tokens, limit) for limit in (DECODE_TOKENS, FUSED_TOKENS))
    on_gpu = x.get_device().type == "cuda" and wide == torch.float32 and interleaved
    if on_gpu and None not in (few, fused) and 0 not in (tokens, *signs.get_size()):
        if few:
            return _few_tokens(x, [signs], in_scale, out_scale, bias, result)
        y, out_scale = _many_tokens(x, signs, in_scale, out_scale, result, fast, bool(fused))
    else:
        # The operator looks at the number of tokens when it is called.
        return ir.lower_to_operator(
            torch.ops.dbf.sign_matmul.default,
            *(x, signs, in_scale, out_scale, bias),
            dtype=dtype,
            interleaved=interleaved,
            fast=fast,
        )
    if out_scale is not None:
        y = ir.multiply(y, ir.cast(out_scale, wide))
    if bias is not None:
        y = ir.add(y, ir.cast(bias, wide))
    return ir.cast(y, result)


def sign_matmul_group(x: Any, signs: Sequence[Any], in_scale: Any = None, fast: bool = False) -> Any:
    """Lower ``dbf::sign_matmul_group``, which the passes emit for few tokens on a GPU, to one launch."""
    return _few_tokens(x, signs, in_scale, None, None, torch.float32)


def _cpu_kernel_takes(x: Any, result: torch.dtype, vectors: Sequence[Any]) -> bool:
    return (
        x.get_device().type == "cpu"
        and all(
            dtype in cpu_kernel.DTYPES for dtype in (x.get_dtype(), result, *(v.get_dtype() for v in vectors))
        )
        and not ir.emits_cpp_wrapper()
        and cpu_kernel.available()
    )


def _few_tokens(
    x: Any, signs: Sequence[Any], in_scale: Any, out_scale: Any, bias: Any, result: torch.dtype
) -> Any:
    from dbf_compile.kernels.sign_matmul import triton_decode

    *leading, K = x.get_size()
    M, rows = math.prod(leading), [int(one.get_size()[0]) for one in signs]
    N = sum(rows)
    # What the kernel before has left in parts, this one adds up.
    terms, operand = ir.split_k_of(x) if in_scale is None else (1, None)
    if in_scale is not None and ir.can_fuse_after(x):
        # Each value is scaled once, by the kernel that computes it, and not by every program that reads it.
        x = ir.multiply(ir.cast(x, torch.float32), ir.cast(in_scale, torch.float32))
        in_scale = None
    if operand is None:
        operand = ir.view(x, [M, K])
    scale = [] if in_scale is None else [in_scale]
    guess = ir.size_guess(M)
    # Adding parts up is for the next kernel; where there is none, it is not worth one of its own.
    adds_up = ir.is_read_by_another_kernel(_PRODUCTS)
    parts = triton_decode.choose_split_k(guess, N, int(K)) if adds_up else 1
    y = ir.lower_to_template(
        _decode_template(),
        triton_decode.decode_blocks(guess, N, int(K), parts),
        {
            "X_SPLIT_K": terms,
            "SCALED": in_scale is not None,
            "RAGGED": any(map(is_ragged, rows)),
            "MATRICES": len(rows),
            **{f"FIRST{index}": sum(rows[:index]) for index in range(1, len(rows))},
        },
        ir.contiguous(operand, *signs, *scale),
        [parts * M, N],
        [M, N],
    )
    if out_scale is not None:
        y = ir.multiply(y, ir.cast(out_scale, torch.float32))
    y = ir.reduce_split_k(y, parts, [*leading, N])
    if bias is not None:
        y = ir.add(y, ir.cast(bias, torch.float32))
    return ir.cast(y, result)


def _many_tokens(
    x: Any, signs: Any, in_scale: Any, out_scale: Any, result: torch.dtype, fast: bool, fused: bool
) -> tuple[Any, Any]:
    """Return the product, and out_scale if that is not in it yet."""
    from dbf_compile.kernels.sign_matmul import triton_prefill

    *leading, K = x.get_size()
    M, N = math.prod(leading), int(signs.get_size()[0])
    narrow = triton_prefill.operand_dtype(x.get_dtype(), result)
    count = triton_prefill.operand_count(x.get_dtype(), result, fast)
    z = x
    if in_scale is not None or count > 1:
        z = ir.cast(x, torch.float32)
    if in_scale is not None:
        z = ir.multiply(z, ir.cast(in_scale, torch.float32))
    if count == 1 and not fused:
        dense = _dense_signs(signs, out_scale, K, narrow)
        sums = narrow if result == narrow else torch.float32
        y = ir.matmul(ir.view(ir.cast(z, narrow), [M, K]), dense, sums)
        return ir.view(y, [*leading, N]), None
    terms = []
    for _ in range(count - 1):
        upper = ir.truncate_to_bfloat16(z)
        terms.append(ir.cast(upper, narrow))
        z = ir.where_finite(z, ir.subtract(z, upper))
    terms.append(ir.cast(z, narrow))
    operand = ir.concatenate([ir.view(term, [M, K]) for term in terms])
    y = ir.lower_to_template(
        _prefill_template(),
        triton_prefill.prefill_blocks(ir.size_guess(M), N, count),
        {"OPERANDS": count, "RAGGED": is_ragged(N)},
        ir.contiguous(operand, signs),
        [M, N],
        [M, N],
    )
    return ir.view(y, [*leading, N]), out_scale


def _dense_signs(signs: Any, scale: Any, K: Any, dtype: torch.dtype) -> Any:
    """Return ``w[n, k] = scale[n] · signs[n, k]`` in a buffer of ``dtype`` [N, K]."""
    from dbf_compile.kernels.sign_matmul import triton_dequantize

    N = int(signs.get_size()[0])
    return ir.lower_to_template(
        _dequantize_template(),
        triton_dequantize.dequantize_blocks(int(K)),
        {
            # By this name Inductor knows the dtype of a tile that is not of float32.
            "ACC_TYPE": str(dtype).replace("torch", "tl"),
            "SCALED": scale is not None,
            "RAGGED": is_ragged(N),
        },
        ir.contiguous(signs, *([] if scale is None else [scale])),
        [N, K],
        [N, K],
        dtype,
    )


@cache
def _decode_template() -> Any:
    from dbf_compile.kernels.sign_matmul import triton_decode

    return _template(
        "dbf_decode",
        triton_decode.decode_grid,
        triton_decode.DEVICE_FUNCTIONS,
        """
{% set inputs = ["X", "SIGNS0", "SIGNS1", "SIGNS2", "SIGNS3"][:MATRICES + 1] + (["IN_SCALE"] if SCALED else []) %}
{{def_kernel(*inputs)}}
    M = {{size(None, 0)}} // SPLIT_K
    N = {{size(None, 1)}}
    K: tl.constexpr = {{size("X", 1)}}
    part, m, n = decode_rows(M, BLOCK_M, BLOCK_N, SPLIT_K)
    W = {{size("SIGNS0", 1)}}
    rows, apart = first_words(SIGNS0, n, {{size("SIGNS0", 0)}}, W, RAGGED)
{% for index in range(1, MATRICES) %}
    own, own_apart = first_words(SIGNS{{index}}, n - FIRST{{index}}, {{size("SIGNS" ~ index, 0)}}, W, RAGGED)
    rows, apart = tl.where(n < FIRST{{index}}, rows, own), tl.where(n < FIRST{{index}}, apart, own_apart)
{% endfor %}
    y = decode_tile(
        X, {{"IN_SCALE" if SCALED else "None"}}, rows, apart, part, m, n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_W, SPLIT_K, X_SPLIT_K,
    )
    m = part * M + m + tl.arange(0, BLOCK_M)
    M = (part + 1) * M
""",
    )


@cache
def _prefill_template() -> Any:
    from dbf_compile.kernels.sign_matmul import triton_prefill

    return _template(
        "dbf_prefill",
        triton_prefill.prefill_grid,
        triton_prefill.DEVICE_FUNCTIONS,
        """
{{def_kernel("X", "SIGNS")}}
    M = {{size(None, 0)}}
    N = {{size(None, 1)}}
    K = {{size("X", 1)}}
    m, n = prefill_rows(M, N, BLOCK_M, BLOCK_N)
    y = prefill_tile(X, SIGNS, m, n, M, N, K, OPERANDS, RAGGED, BLOCK_M, BLOCK_N, BLOCK_K)
    m = m + tl.arange(0, BLOCK_M)
""",
    )


@cache
def _dequantize_template() -> Any:
    from dbf_compile.kernels.sign_matmul import triton_dequantize

    return _template(
        "dbf_dequantize",
        triton_dequantize.dequantize_grid,
        triton_dequantize.DEVICE_FUNCTIONS,
        """
{{def_kernel(*(["SIGNS", "SCALE"] if SCALED else ["SIGNS"]))}}
    N = {{size(None, 0)}}
    K = {{size(None, 1)}}
    n, k = dequantize_rows(K, BLOCK_N, BLOCK_K)
    y = dequantize_tile(
        SIGNS, {{"SCALE" if SCALED else "None"}}, n, k, N, {{size("SIGNS", 1)}}, ACC_TYPE, RAGGED, BLOCK_N, BLOCK_K
    )
    k += tl.arange(0, BLOCK_K)
""",
        row="n",
        column="k",
    )


def _template(
    name: str,
    grid: Callable[..., Any],
    functions: Sequence[Any],
    body: str,
    row: str = "m",
    column: str = "n",
) -> Any:
    """Return a template around functions of a kernel: their text stands before it, and its tile ``y`` is stored.

    Args:
        row, column: what the body calls the rows and columns of the tile; a capital is how many there are in all.
    """
    texts = ["import triton\nimport triton.language as tl\n"]
    texts += [inspect.getsource(function.fn) for function in functions]
    store = f"""
    idx_{row} = {row}[:, None]
    idx_{column} = {column}[None, :]
    mask = (idx_{row} < {row.upper()}) & (idx_{column} < {column.upper()})
    {{{{store_output(("idx_{row}", "idx_{column}"), "y", "mask", val_shape=("BLOCK_{row.upper()}", "BLOCK_{column.upper()}"))}}}}
"""
    return ir.triton_template(name, grid, "\n\n".join(texts) + body + store)
