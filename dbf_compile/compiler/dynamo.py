"""Reads and extends the graphs that Dynamo captures.

Private names of torch stand here and in ``inductor``, ``ir``, ``programs`` and ``registration`` beside it, nowhere else. Proven on torch 2.11 to 2.13.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Graph, GraphModule, Node

# Why an input of a graph has no data.
WITHOUT_DATA = "without data: traced under a fake mode, or split by DDP, which torch._dynamo.config.optimize_ddp = False prevents"


def copy_graph(gm: GraphModule) -> GraphModule:
    """Return a copy to rewrite; Dynamo still reads the nodes of its own graph after the backend returned."""
    graph, copied = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copied))
    copy = GraphModule(gm, graph)  # with the submodules that the graph names, such as bodies of torch.cond
    copy.meta = dict(gm.meta)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.meta.pop(
            "grapharg", None
        )  # refers to the weight, which nobody could swap then; Dynamo removes its own
    if hasattr(gm, "_param_name_to_source"):
        sources: Any = gm._param_name_to_source
        object.__setattr__(copy, "_param_name_to_source", dict(sources))
    return copy


def symbolic_sizes() -> AbstractContextManager[Any]:
    """Return a context in which torch functions take fake tensors of symbolic sizes; torch 2.13 needs none."""
    return enable_python_dispatcher() if torch.__version__ < "2.13" else nullcontext()


def within_transform() -> bool:
    """Return whether a transform of ``torch.func`` is around this call; Dynamo guards it."""
    return peek_interpreter_stack() is not None


def outside_transforms() -> AbstractContextManager[Any]:
    """Return a context in which new tensors belong to no transform of ``torch.func``."""
    return temporarily_clear_interpreter_stack()


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor is one of many, or a derivative, for a transform of ``torch.func``."""
    return bool(is_functorch_wrapped_tensor(tensor))


def within_forward_mode() -> bool:
    """Return whether inputs may have tangents, which compiled code loses without a word; Dynamo does not guard it."""
    return forward_ad._current_level >= 0


def is_static_input(node: Node) -> bool:
    """Return whether a placeholder is a parameter or buffer of a module, not an argument of the call."""
    tensor_dict = node.meta.get("tensor_dict") or {}
    return node.op == "placeholder" and tensor_dict.get("_dynamo_static_input_type") is not None


def is_real(value: object) -> bool:
    """Return whether ``value`` is a tensor with data, neither fake nor on the meta device."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type != "meta"


def qualified_name(node: Node) -> str:
    """Return the name of a parameter as in ``named_parameters``, relative to the compiled module."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", node.name)
    name = name() if callable(name) else name  # a method until torch 2.11
    return ".".join(re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name)) or node.name


def path_of(node: Node) -> str:
    """Return where a placeholder stands in the arguments of the captured function, as in ``L['keys'][3]``."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.11


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Let a dimension of a tensor be of any size in what is compiled for it."""
    torch._dynamo.mark_dynamic(tensor, dimension)


def assumed_sizes() -> list[str]:
    """Return what the compilation that goes on has assumed of sizes that may change: guards that other sizes would not pass."""
    env: Any = TracingContext.get().fake_mode.shape_env  # type: ignore[union-attr]
    fixed = [f"{symbol} = {value}" for symbol, value in env.replacements.items() if value.is_number]
    return fixed + [str(guard.expr) for guard in env.guards if env.simplify(guard.expr) != True]  # noqa: E712  # of sympy


def add_static_input(graph: Graph, name: str, tensor: Tensor) -> tuple[Node, Tensor]:
    """Append a placeholder for a tensor that every call passes, as Dynamo passes parameters.

    Returns:
        The placeholder, and the fake tensor to compile with: a real one would get dynamic shapes.
    """
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    # Dynamo traces under one fake mode and compiles under another: nodes belong to the first, inputs to the second.
    traced = next(
        value for item in placeholders if isinstance(value := item.meta.get("example_value"), FakeTensor)
    )
    node.meta["example_value"] = _fake_like(tensor, traced.fake_mode)
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None
    return node, _fake_like(tensor, fake_mode)


def _fake_like(tensor: Tensor, mode: Any) -> Tensor:
    # As mode.from_tensor for a plain tensor of fixed sizes, but five times faster.
    device = "cpu" if tensor.is_meta else tensor.device
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
