"""Builds Inductor's IR: what the lowerings are written in.

Private names of torch stand here and in ``dynamo``, ``inductor``, ``programs`` and ``registration`` beside it, nowhere else. Proven on torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, lowerings, to_dtype
from torch._inductor.lowering import register_lowering as _register_lowering
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv


def register_lowering(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> None:
    """Register ``lowering`` for ``op`` with Inductor, without type promotion."""
    _register_lowering(op, type_promotion_kind=None)(lowering)


def lower_to_operator(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Lower to a call of the operator itself, on any device."""
    return fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def multiply(a: Any, b: Any) -> Any:
    """Return ``a · b`` for Inductor to fuse."""
    return lowerings[torch.ops.aten.mul.Tensor](a, b)


def add(a: Any, b: Any) -> Any:
    """Return ``a + b`` for Inductor to fuse."""
    return lowerings[torch.ops.aten.add.Tensor](a, b)


def subtract(a: Any, b: Any) -> Any:
    """Return ``a - b`` for Inductor to fuse."""
    return lowerings[torch.ops.aten.sub.Tensor](a, b)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Return ``x`` in ``dtype`` for Inductor to fuse."""
    return to_dtype(x, dtype)


def can_fuse_after(x: Any) -> bool:
    """Return whether Inductor generates the kernel that computes ``x``, and so can fuse more operations into it."""
    while isinstance(x, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        x = x.data
    return isinstance(x, (ir.Loops, ir.ComputedBuffer, ir.TemplateBuffer))


def is_read_by_another_kernel(products: Sequence[torch._ops.OpOverload]) -> bool:
    """Return whether another kernel, which Inductor generates anyway, reads the node that is being lowered.

    False for a result of the graph. False also if only element-wise operations stand between the node and the only one of
    ``products`` that reads it: Inductor fuses these into the kernel of the node.
    """
    node = V.graph.current_node
    if any(user.op == "output" for user in node.users):
        return False
    fused = False
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in products:
            return not fused
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return True
        fused = True
    return True


def reduce_split_k(partial_sums: Any, split_k: int, size: Sequence[Any]) -> Any:
    """Return the sum of partial sums, for Inductor to fuse; :func:`split_k_of` finds them again.

    Args:
        partial_sums: [split_k · M, N], one matrix below the other.
        split_k: number of partial sums.
        size: of the result, [..., N] of M · N values.
    """
    if split_k == 1:
        return view(partial_sums, size)
    M = FloorDiv(partial_sums.get_size()[0], split_k)
    load = partial_sums.make_loader()

    def value(index: Sequence[Any]) -> Any:
        m, n = index
        total = load([m, n])
        for split in range(1, split_k):
            total = ops.add(total, load([m + split * M, n]))
        return total

    total: Any = ir.Pointwise.create(
        device=partial_sums.get_device(),
        dtype=partial_sums.get_dtype(),
        inner_fn=value,
        ranges=[M, partial_sums.get_size()[1]],
    )
    y = view(total, size)
    y._dbf_split_k = (split_k, partial_sums, total.data, total.data.data)
    return y


def split_k_of(x: Any) -> tuple[int, Any]:
    """Return the split-K factor and the partial sums of which :func:`reduce_split_k` made ``x``, else 1 and None.

    Also 1 and None once the graph has written to ``x``: Inductor may then keep x in memory, and the partial sums do not
    have what was written.
    """
    split: tuple[int, Any, Any, Any] = getattr(x, "_dbf_split_k", (1, None, None, None))
    split_k, partial_sums, storage, formula = split
    while isinstance(x, (ir.TensorBox, ir.BaseView)):
        x = x.data
    unchanged = storage is not None and x is storage and x.data is formula
    return (split_k, partial_sums) if unchanged else (1, None)


def matmul(a: Any, b: Any, dtype: torch.dtype) -> Any:
    """Return ``a · bᵀ`` of two matrices by the library of a GPU; ``dtype`` is theirs or float32."""
    b = lowerings[torch.ops.aten.permute.default](b, [1, 0])
    if dtype == a.get_dtype():
        return lowerings[torch.ops.aten.mm.default](a, b)
    return lowerings[torch.ops.aten.mm.dtype](a, b, dtype)


def can_call(op: torch._ops.OpOverload) -> bool:
    """Return whether Inductor's program can call an operator by name: one in C++ needs a C function of it."""
    return not V.graph.cpp_wrapper or op in config.aot_inductor.custom_ops_to_c_shims


def contiguous(*inputs: Any) -> list[Any]:
    """Return the inputs as contiguous tensors in memory."""
    return [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(item)) for item in inputs]


def lower_to_out_call(
    op: torch._ops.OpOverload,
    inputs: Sequence[Any],
    size: Sequence[Any],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> Any:
    """Lower to ``op(*inputs, **settings, out=buffer)``; inputs are contiguous, and Inductor plans the buffer.

    Args:
        op: an overload named ``out``.
        inputs: tensors of the graph.
        size: of the buffer; may be symbolic.
        dtype: of the buffer.
        settings: keyword arguments other than tensors.
    """
    realized = contiguous(*inputs)
    layout = ir.FixedLayout(realized[0].get_device(), dtype, list(size))
    call = ir.ExternKernelOut(
        layout,
        realized,
        kwargs=dict(settings),
        python_kernel_name=f"torch.ops.{op.namespace}.{op._opname}.{op._overloadname}",
        op_overload=op,
    )
    return ir.TensorBox.create(call)


def triton_template(name: str, grid: Callable[..., Any], source: str) -> TritonTemplate:
    """Return a template of a Triton kernel, into which Inductor fuses what follows.

    Args:
        name: of the template; no two templates may share one.
        grid: ``grid(*grid_size, settings, cdiv=...)`` returns three numbers of programs.
        source: of the kernel, with Inductor's hooks.
    """
    return TritonTemplate(name, SymbolicGridFn(grid), source)


def lower_to_template(
    template: TritonTemplate,
    settings: Sequence[Mapping[str, Any]],
    constants: Mapping[str, Any],
    inputs: Sequence[Any],
    size: Sequence[Any],
    grid_size: Sequence[Any],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Lower to a kernel of a template that fills a buffer; Inductor fuses what follows into it.

    Args:
        template: of :func:`triton_template`.
        settings: launch settings to tune over; without tuning, the first is used.
        constants: further constants of the template.
        inputs: contiguous tensors of the graph, see :func:`contiguous`.
        size: of the buffer, two numbers; may be symbolic.
        grid_size: arguments of the template's grid.
        dtype: of the buffer.
    """
    tune = config.max_autotune or config.max_autotune_gemm
    layout = ir.FixedLayout(inputs[0].get_device(), dtype, list(size))
    choices: list[Any] = []
    for launch in settings if tune else settings[:1]:
        template.maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=layout,
            call_sizes=list(grid_size),
            **constants,
            **launch,
        )
    result = autotune_select_algorithm(template.name, choices, list(inputs), layout)
    return result[0] if isinstance(result, tuple) else result  # since torch 2.12 a pair with the choice


def view(x: Any, size: Sequence[Any]) -> Any:
    """Return ``x`` in another shape."""
    return lowerings[torch.ops.aten.view.default](x, list(size))


def concatenate(matrices: Sequence[Any]) -> Any:
    """Return matrices stacked along their rows."""
    return matrices[0] if len(matrices) == 1 else lowerings[torch.ops.aten.cat.default](list(matrices), 0)


def truncate_to_bfloat16(x: Any) -> Any:
    """Return float32 numbers truncated to the upper 16 bits, which bfloat16 has, as float32.

    Casts to bfloat16 and back would have no effect: within a fused kernel, Inductor drops both.
    """
    bits = lowerings[torch.ops.aten.view.dtype](x, torch.int32)
    upper = lowerings[torch.ops.aten.bitwise_and.Tensor](bits, -(2**16))
    return lowerings[torch.ops.aten.view.dtype](upper, torch.float32)


def where_finite(condition: Any, x: Any) -> Any:
    """Return ``x`` where the float32 ``condition`` is finite, else 0, for Inductor to fuse."""
    size = lowerings[torch.ops.aten.abs.default](condition)
    finite = lowerings[torch.ops.aten.le.Scalar](size, torch.finfo(torch.float32).max)
    return lowerings[torch.ops.aten.where.self](finite, x, 0.0)


def known_at_most(size: Any, limit: int) -> bool | None:
    """Return whether a size, which may be symbolic, is at most ``limit``; None if both are possible."""
    sizevars: Any = V.graph.sizevars
    if sizevars.statically_known_leq(size, limit):
        return True
    return False if sizevars.statically_known_gt(size, limit) else None


def known_size(size: Any) -> int:
    """Return the value of a size; where it is symbolic, the compiled code is for this value only."""
    sizevars: Any = V.graph.sizevars
    return int(sizevars.guard_int(size))


def size_estimate(size: Any) -> int:
    """Return the value of a symbolic size at tracing; for choices of speed only, as later calls have other values."""
    sizevars: Any = V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint  # renamed after torch 2.11
    return int(hint(size))
