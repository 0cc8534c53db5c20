"""Builds Inductor's IR: what the lowerings are written in.

Private names of torch stand here and in ``dynamo.py`` and ``inductor.py`` beside it, nowhere else. Proven on torch 2.11 to 2.13.
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
    """Let Inductor lower ``op`` by ``lowering``; types are not promoted."""
    _register_lowering(op, type_promotion_kind=None)(lowering)


def lower_to_operator(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Lower to a call of the operator itself, whatever device it runs on."""
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
    """Return whether Inductor writes the kernel that computes ``x``, so that it can put more of its own into it."""
    while isinstance(x, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        x = x.data
    return isinstance(x, (ir.Loops, ir.ComputedBuffer, ir.TemplateBuffer))


def is_read_by_another_kernel(products: Sequence[torch._ops.OpOverload]) -> bool:
    """Return whether a kernel that Inductor writes anyway reads what is being lowered.

    Not so for a result of the graph, nor for what only element-wise operations lead to one of ``products``: these become
    part of the kernel that is being lowered.
    """
    node = V.graph.current_node
    if any(user.op == "output" for user in node.users):
        return False
    on_the_way = False
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in products:
            return not on_the_way
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return True
        on_the_way = True
    return True


def reduce_split_k(parts: Any, count: int, size: Sequence[Any]) -> Any:
    """Return a matrix of ``size`` for Inductor to fuse, the sum of ``count`` that lie one below the other.

    Args:
        parts: [count · M, N].
        size: whose product is M · N.
    """
    if count == 1:
        return view(parts, size)
    M = FloorDiv(parts.get_size()[0], count)
    load = parts.make_loader()

    def value(index: Sequence[Any]) -> Any:
        m, n = index
        total = load([m, n])
        for part in range(1, count):
            total = ops.add(total, load([m + part * M, n]))
        return total

    ranges = [M, parts.get_size()[1]]
    total: Any = ir.Pointwise.create(
        device=parts.get_device(), dtype=parts.get_dtype(), inner_fn=value, ranges=ranges
    )
    y = view(total, size)
    y._dbf_parts = (count, parts, total.data, total.data.data)
    return y


def split_k_of(x: Any) -> tuple[int, Any]:
    """Return what :func:`reduce_split_k` made ``x`` of: the number of parts and their buffer; or 1 and None.

    None as well once somebody has written to ``x``, which lets Inductor keep it in memory: the parts know nothing of that.
    """
    made: tuple[int, Any, Any, Any] = getattr(x, "_dbf_parts", (1, None, None, None))
    count, parts, storage, formula = made
    while isinstance(x, (ir.TensorBox, ir.BaseView)):
        x = x.data
    return (count, parts) if storage is not None and x is storage and x.data is formula else (1, None)


def matmul(a: Any, b: Any, dtype: torch.dtype) -> Any:
    """Return ``a · bᵀ`` of two matrices in ``dtype``, theirs or float32, by the library of a GPU."""
    b = lowerings[torch.ops.aten.permute.default](b, [1, 0])
    if dtype == a.get_dtype():
        return lowerings[torch.ops.aten.mm.default](a, b)
    return lowerings[torch.ops.aten.mm.dtype](a, b, dtype)


def emits_cpp_wrapper() -> bool:
    """Return whether the graph being lowered becomes a C++ program, which cannot call operators by Python name."""
    return bool(V.graph.cpp_wrapper)


def contiguous(*inputs: Any) -> list[Any]:
    """Return the inputs in memory, row after row."""
    return [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(item)) for item in inputs]


def lower_to_out_call(
    op: torch._ops.OpOverload,
    inputs: Sequence[Any],
    size: Sequence[Any],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> Any:
    """Lower to ``op(*inputs, **settings, out=buffer)``, with contiguous inputs and a contiguous buffer that Inductor plans.

    Args:
        op: an overload named ``out``.
        inputs: tensors of the graph.
        size: of the buffer; may be symbolic.
        dtype: of the buffer.
        settings: keyword arguments that are no tensors.
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
    """Return a Triton kernel that Inductor completes with what it fuses; a name is good for one template.

    Args:
        name: of the template.
        grid: ``grid(*size, settings, cdiv=...)``, three numbers of programs.
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
    """Lower to a kernel that fills a buffer, and into which Inductor fuses what is done to its values.

    Args:
        template: made by :func:`triton_template`.
        settings: launch settings worth trying; the first is taken unless the user lets Inductor tune.
        constants: further constants of the template.
        inputs: contiguous tensors of the graph, see :func:`contiguous`.
        size: of the buffer, two numbers; may be symbolic.
        grid_size: what the template's grid is made for.
        dtype: of the buffer.
    """
    tune = config.max_autotune or config.max_autotune_gemm
    layout = ir.FixedLayout(inputs[0].get_device(), dtype, list(size))
    choices: list[Any] = []
    for one in settings if tune else settings[:1]:
        template.maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=layout,
            call_sizes=list(grid_size),
            **constants,
            **one,
        )
    found = autotune_select_algorithm(template.name, choices, list(inputs), layout)
    return found[0] if isinstance(found, tuple) else found  # with the choice since torch 2.12


def view(x: Any, size: Sequence[Any]) -> Any:
    """Return ``x`` in another shape."""
    return lowerings[torch.ops.aten.view.default](x, list(size))


def concatenate(parts: Sequence[Any]) -> Any:
    """Return tensors one below the other."""
    return parts[0] if len(parts) == 1 else lowerings[torch.ops.aten.cat.default](list(parts), 0)


def truncate_to_bfloat16(x: Any) -> Any:
    """Return float32 numbers without the 16 bits that bfloat16 does not have, as float32.

    Casting to bfloat16 and back would not do: within a fused kernel, Inductor leaves both casts out.
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
    """Return whether a symbolic size is at most ``limit``; None where both may happen."""
    sizevars: Any = V.graph.sizevars
    if sizevars.statically_known_leq(size, limit):
        return True
    return False if sizevars.statically_known_gt(size, limit) else None


def size_guess(size: Any) -> int:
    """Return the number a symbolic size had when it was traced; good for choices, never for correctness."""
    sizevars: Any = V.graph.sizevars
    guess = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint  # renamed after torch 2.11
    return int(guess(size))
