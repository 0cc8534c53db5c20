"""Lowerings of the dbf:: operators: the one door between graphs and kernels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

import dbf_compile.attention_ops  # noqa: F401  # registers the operator
from dbf_compile.compiler import ir, table_lowerings
from dbf_compile.hashes import source_hash
from dbf_compile.kernels.cached_attention import cpu_kernel as attention_kernel
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import accumulator_dtype
from dbf_compile.kernels.sign_matmul.regimes import Regime, choose_regime, operand_count, operand_dtype
from dbf_compile.signs import is_ragged

_PRODUCTS = (torch.ops.dbf.sign_matmul.default, torch.ops.dbf.sign_matmul_group.default)


@cache
def register() -> None:
    """Register all lowerings, once per process."""
    ir.register_lowering(torch.ops.dbf.sign_matmul.default, sign_matmul)
    ir.register_lowering(torch.ops.dbf.double_binary_linear.default, double_binary_linear)
    ir.register_lowering(torch.ops.dbf.sign_matmul_group.default, sign_matmul_group)
    ir.register_lowering(torch.ops.dbf.row_matmul.default, table_lowerings.row_matmul)
    ir.register_lowering(torch.ops.dbf.cached_attention.default, cached_attention)
    ir.register_lowering(torch.ops.dbf.prepared_layers.default, prepared_layers)


def fingerprint() -> str:
    """Return what lowered programs depend on beside their graph: our sources, and whether the C++ kernel works here."""
    return f"{source_hash('dbf_compile')} {cpu_kernel.available()}"


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
    """Lower ``dbf::sign_matmul``: to the C++ kernel on a CPU, to a Triton kernel on a GPU, else to the operator.

    The C++ kernel applies scales and bias to values that it holds in registers anyway; kernels of their own would double
    the number of C++ kernels to compile. Into the Triton kernels Inductor fuses out_scale, bias and what follows.
    `in_scale` is fused into the producer of x; only for few tokens, without one, does the kernel apply it.
    """
    wide = accumulator_dtype(x.get_dtype())
    result = dtype or wide
    vectors = [in_scale, out_scale, bias]
    while vectors and vectors[-1] is None:
        vectors.pop()
    # Arguments are positional: none may be missing in the middle.
    if None not in vectors and _cpu_kernel_takes(x, result, vectors):
        return ir.lower_to_out_call(
            torch.ops.dbf_native.sign_matmul.out,
            (x, signs, *vectors),
            [*x.get_size()[:-1], signs.get_size()[0]],
            result,
            {"interleaved": interleaved, "fast": fast},
        )
    tokens = math.prod(x.get_size()[:-1])
    operands, narrow = operand_count(x.get_dtype(), result, fast), operand_dtype(x.get_dtype(), result)
    regime = choose_regime(tokens, operands, ir.known_at_most)
    on_gpu = x.get_device().type == "cuda" and wide == torch.float32 and interleaved
    if not on_gpu or regime is None or 0 in (tokens, *signs.get_size()):
        # The operator counts the tokens when it is called.
        return ir.lower_to_operator(
            torch.ops.dbf.sign_matmul.default,
            *(x, signs, in_scale, out_scale, bias),
            dtype=dtype,
            interleaved=interleaved,
            fast=fast,
        )
    if regime is Regime.DECODE:
        return _decode(x, [signs], in_scale, out_scale, bias, result)
    z = x if in_scale is None and operands == 1 else ir.cast(x, torch.float32)
    if in_scale is not None:
        z = ir.multiply(z, ir.cast(in_scale, torch.float32))
    if regime is Regime.DENSE:
        y = _dense(z, signs, out_scale, narrow, narrow if result == narrow else torch.float32)
        out_scale = None
    else:
        y = _prefill(z, signs, narrow, operands)
    if out_scale is not None:
        y = ir.multiply(y, ir.cast(out_scale, wide))
    if bias is not None:
        y = ir.add(y, ir.cast(bias, wide))
    return ir.cast(y, result)


def sign_matmul_group(x: Any, signs: Sequence[Any], in_scale: Any = None, fast: bool = False) -> Any:
    """Lower ``dbf::sign_matmul_group``, which the passes emit for few tokens on a GPU, to one launch."""
    return _decode(x, signs, in_scale, None, None, torch.float32)


def prepared_layers(
    x: Any, prepared: Any, columns: int, dtype: torch.dtype | None = None, fast: bool = False
) -> Any:
    """Lower ``dbf::prepared_layers``, which programs have on a CPU, to one call."""
    result = dtype or accumulator_dtype(x.get_dtype())
    return ir.lower_to_out_call(
        torch.ops.dbf_native.prepared_layers.out,
        (x, prepared),
        [*x.get_size()[:-1], columns],
        result,
        {"fast": fast},
    )


def cached_attention(
    q: Any,
    keys: Any,
    values: Any,
    positions: Any,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Any:
    """Lower ``dbf::cached_attention``: on a CPU to one call of the C++ kernel, else to the operator."""
    on_cpu = q.get_device().type == "cpu" and attention_kernel.takes(q.get_dtype())
    if not on_cpu or not ir.can_call(torch.ops.dbf_native.cached_attention.out):
        return ir.lower_to_operator(
            torch.ops.dbf.cached_attention.default, q, keys, values, positions, scale, window, cap
        )
    B, H, T, _ = q.get_size()
    return ir.lower_to_out_call(
        torch.ops.dbf_native.cached_attention.out,
        (q, keys, values, positions),
        [B, T, H, values.get_size()[-1]],
        q.get_dtype(),
        {"scale": scale, "window": window, "cap": cap},
    )


def _cpu_kernel_takes(x: Any, result: torch.dtype, vectors: Sequence[Any]) -> bool:
    return (
        x.get_device().type == "cpu"
        and 0 not in x.get_size()
        and all(
            dtype in cpu_kernel.DTYPES for dtype in (x.get_dtype(), result, *(v.get_dtype() for v in vectors))
        )
        and cpu_kernel.available()
        and ir.can_call(torch.ops.dbf_native.sign_matmul.out)
    )


def _sizes(x: Any) -> list[Any]:
    """Return the sizes of activations [..., K]: K is a number also where the graph has symbols, as in a product of sizes."""
    *leading, K = x.get_size()
    return [*leading, ir.known_size(K)]


def _decode(
    x: Any, signs: Sequence[Any], in_scale: Any, out_scale: Any, bias: Any, result: torch.dtype
) -> Any:
    """Multiply few tokens by look-up tables; the results of several sign matrices lie side by side."""
    from dbf_compile.kernels.sign_matmul import triton_decode

    *leading, K = _sizes(x)
    M, rows = math.prod(leading), [int(matrix.get_size()[0]) for matrix in signs]
    N = sum(rows)
    # If the kernel before left partial sums of x, this one adds them.
    x_split_k, operand = ir.split_k_of(x) if in_scale is None else (1, None)
    if in_scale is not None and ir.can_fuse_after(x):
        # Scale each value once, in the kernel that computes it, not in every program that reads it.
        x = ir.multiply(ir.cast(x, torch.float32), ir.cast(in_scale, torch.float32))
        in_scale = None
    if operand is None:
        operand = ir.view(x, [M, K])
    estimate = ir.size_estimate(M)
    # The next kernel adds the partial sums; without one, adding them would cost a kernel of its own.
    can_split = ir.is_read_by_another_kernel(_PRODUCTS)
    split_k = triton_decode.choose_split_k(estimate, N, K) if can_split else 1
    y = ir.lower_to_template(
        _decode_template(),
        triton_decode.decode_blocks(estimate, N, K, split_k),
        {
            "X_SPLIT_K": x_split_k,
            "SCALED": in_scale is not None,
            "RAGGED": any(map(is_ragged, rows)),
            "MATRICES": len(rows),
            **{f"FIRST{index}": sum(rows[:index]) for index in range(1, len(rows))},
        },
        ir.contiguous(operand, *signs, *([] if in_scale is None else [in_scale])),
        [split_k * M, N],
        [M, N],
    )
    if out_scale is not None:
        y = ir.multiply(y, ir.cast(out_scale, torch.float32))
    y = ir.reduce_split_k(y, split_k, [*leading, N])
    if bias is not None:
        y = ir.add(y, ir.cast(bias, torch.float32))
    return ir.cast(y, result)


def _prefill(z: Any, signs: Any, dtype: torch.dtype, operands: int) -> Any:
    """Multiply scaled activations, split into 16-bit operands, by signs that become ±1 in registers."""
    from dbf_compile.kernels.sign_matmul import triton_prefill

    *leading, K = _sizes(z)
    M, N = math.prod(leading), int(signs.get_size()[0])
    split = []
    for _ in range(operands - 1):
        upper = ir.truncate_to_bfloat16(z)
        split.append(ir.cast(upper, dtype))
        z = ir.where_finite(z, ir.subtract(z, upper))
    split.append(ir.cast(z, dtype))
    y = ir.lower_to_template(
        _prefill_template(),
        triton_prefill.prefill_blocks(ir.size_estimate(M), N, operands),
        {"OPERANDS": operands, "RAGGED": is_ragged(N)},
        ir.contiguous(ir.concatenate([ir.view(operand, [M, K]) for operand in split]), signs),
        [M, N],
        [M, N],
    )
    return ir.view(y, [*leading, N])


def _dense(z: Any, signs: Any, scale: Any, dtype: torch.dtype, sums: torch.dtype) -> Any:
    """Multiply scaled activations by a dense matrix of signs and ``scale``, summed in ``sums``."""
    *leading, K = _sizes(z)
    dense = _dequantize(signs, scale, K, dtype)
    y = ir.matmul(ir.view(ir.cast(z, dtype), [math.prod(leading), K]), dense, sums)
    return ir.view(y, [*leading, int(signs.get_size()[0])])


def _dequantize(signs: Any, scale: Any, K: Any, dtype: torch.dtype) -> Any:
    """Return ``w[n, k] = scale[n] · signs[n, k]`` in a buffer of ``dtype`` [N, K]."""
    from dbf_compile.kernels.sign_matmul import triton_dequantize

    N = int(signs.get_size()[0])
    return ir.lower_to_template(
        _dequantize_template(),
        triton_dequantize.dequantize_blocks(K),
        {
            # Inductor reads the dtype of a tile that is not float32 from this name.
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
    split, m, n = decode_rows(M, BLOCK_M, BLOCK_N, SPLIT_K)
    W = {{size("SIGNS0", 1)}}
    rows, apart = first_words(SIGNS0, n, {{size("SIGNS0", 0)}}, W, RAGGED)
{% for index in range(1, MATRICES) %}
    own, own_apart = first_words(SIGNS{{index}}, n - FIRST{{index}}, {{size("SIGNS" ~ index, 0)}}, W, RAGGED)
    rows, apart = tl.where(n < FIRST{{index}}, rows, own), tl.where(n < FIRST{{index}}, apart, own_apart)
{% endfor %}
    y = decode_tile(
        X, {{"IN_SCALE" if SCALED else "None"}}, rows, apart, split, m, n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_W, SPLIT_K, X_SPLIT_K,
    )
    m = split * M + m + tl.arange(0, BLOCK_M)
    M = (split + 1) * M
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
    """Return a template that starts with the text of ``functions`` and stores the tile ``y`` of ``body``.

    Args:
        name: of the template.
        grid: see :func:`dbf_compile.compiler.ir.triton_template`.
        functions: device functions that the body calls, callees first.
        body: of the kernel.
        row, column: the body's names of the rows and columns of its tile; their capitals are the sizes of the result.
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
