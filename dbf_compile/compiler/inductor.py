"""The only file that touches private names of ``torch._inductor`` and ``torch._dynamo``.

Differences between torch versions live here. Proven on torch 2.11 to 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend as _lookup_backend
from torch._guards import TracingContext
from torch._inductor import config, ir, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import fallback_handler, lowerings, to_dtype
from torch._inductor.lowering import register_lowering as _register_lowering
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V, ops
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.functions import FloorDiv

from dbf_compile.errors import OptionError

_POST_GRAD_HOOK = "post_grad_custom_post_pass"


# --- Dynamo's graphs ------------------------------------------------------------------------------------------------


def copy_graph(gm: GraphModule) -> GraphModule:
    """Return a copy that may be rewritten; Dynamo goes on reading the nodes of its own graph after the backend."""
    graph, copied = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copied))
    copy = GraphModule(gm, graph)  # takes over the submodules that the graph names, as bodies of torch.cond
    copy.meta = dict(gm.meta)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    if hasattr(gm, "_param_name_to_source"):
        sources: Any = gm._param_name_to_source
        object.__setattr__(copy, "_param_name_to_source", dict(sources))
    return copy


def symbolic_sizes() -> AbstractContextManager[Any]:
    """Return a context in which torch functions take fake tensors of symbolic sizes; as of torch 2.13 they do anyway."""
    return enable_python_dispatcher() if torch.__version__ < "2.13" else nullcontext()


def is_static_input(node: Node) -> bool:
    """Return whether a placeholder is a parameter or buffer of a module, not an argument of the call."""
    tensor_dict = node.meta.get("tensor_dict") or {}
    return node.op == "placeholder" and tensor_dict.get("_dynamo_static_input_type") is not None


def is_real(value: object) -> bool:
    """Return whether ``value`` is a tensor with memory behind it."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type != "meta"


def qualified_name(node: Node) -> str:
    """Return the name of a parameter as in ``named_parameters``, relative to the compiled module."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", node.name)
    name = name() if callable(name) else name  # a method until torch 2.11
    return ".".join(re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name)) or node.name


def add_static_input(graph: Graph, name: str, tensor: Tensor) -> tuple[Node, Tensor]:
    """Append a placeholder for a tensor that is passed at every call, as Dynamo passes parameters.

    Returns:
        The placeholder, and the fake tensor to compile with; a real one would get dynamic shapes.
    """
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    # Dynamo traced under one fake mode and compiles under another: nodes live in the first, inputs in the second.
    traced = next(
        value for item in placeholders if isinstance(value := item.meta.get("example_value"), FakeTensor)
    )
    node.meta["example_value"] = _fake_like(tensor, traced.fake_mode)
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None
    return node, _fake_like(tensor, fake_mode)


def _fake_like(tensor: Tensor, mode: Any) -> Tensor:
    # What mode.from_tensor does for a plain tensor with fixed sizes, five times faster.
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


# --- compilation ----------------------------------------------------------------------------------------------------


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    settings: Mapping[str, Any],
    fingerprint: str,
    post_grad_passes: Callable[[Graph], None],
) -> Callable[..., Any]:
    """Compile a graph with Inductor.

    Args:
        gm: a Dynamo graph.
        inputs: example inputs in the order of its placeholders.
        settings: Inductor's settings for this compilation only.
        fingerprint: becomes part of the keys of Inductor's caches.
        post_grad_passes: rewrites the graph that is lowered, in place.
    """
    users_pass = settings.get(_POST_GRAD_HOOK, getattr(config, _POST_GRAD_HOOK))
    patches = {**settings, _POST_GRAD_HOOK: _PostGradPass(fingerprint, post_grad_passes, users_pass)}
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Return Inductor's settings for a mode of ``torch.compile``.

    Raises:
        OptionError: an unknown mode.
    """
    known = list_mode_options()
    if mode is not None and mode not in known:
        raise OptionError(f"mode={mode!r}", ", ".join(sorted(known)), "leave it out for the default")
    return dict(known[mode]) if mode is not None else {}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise OptionError if Inductor has no setting of one of these names."""
    known = config.get_config_copy() if settings else {}
    for name in settings:
        if name not in known:
            raise OptionError(
                f"unknown setting {name!r} in option 'inductor'",
                "the names in torch._inductor.config",
                "see torch._inductor.list_options()",
            )


def reset() -> None:
    """Forget what Inductor keeps between compilations, such as CUDA graphs."""
    backend = _lookup_backend("inductor")
    if hasattr(backend, "reset"):
        backend.reset()


class _PostGradPass(CustomGraphPass):
    """Our passes after the user's. Inductor's caches know custom passes by ``uuid()``, but not custom lowerings."""

    def __init__(self, fingerprint: str, passes: Callable[[Graph], None], users_pass: Any) -> None:
        self._fingerprint, self._passes = fingerprint, passes
        # torch 2.13 takes a list as well.
        several = isinstance(users_pass, (list, tuple))
        self._users_passes = tuple(users_pass) if several else () if users_pass is None else (users_pass,)

    def __call__(self, graph: Graph) -> None:
        for users_pass in self._users_passes:
            users_pass(graph)
        self._passes(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        identities = [getattr(users_pass, "uuid", lambda: None)() for users_pass in self._users_passes]
        # A pass without an identity bypasses the caches: that is torch's rule for any such pass.
        return None if None in identities else ("dbf_compile", self._fingerprint, *identities)


# --- lowerings ------------------------------------------------------------------------------------------------------


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


def sum_of_parts(parts: Any, count: int, size: Sequence[Any]) -> Any:
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


def parts_of(x: Any) -> tuple[int, Any]:
    """Return what :func:`sum_of_parts` made ``x`` of: the number of parts and their buffer; or 1 and None.

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


def subtract(a: Any, b: Any) -> Any:
    """Return ``a - b`` for Inductor to fuse."""
    return lowerings[torch.ops.aten.sub.Tensor](a, b)


def cut_to_bfloat16(x: Any) -> Any:
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
