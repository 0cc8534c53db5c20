"""What every pass needs: weights in a graph, writes and aliases, and the emission of new nodes.

Passes rewrite plain torch into plain torch: between any two of them the graph can be run. Every node has a fake tensor in
``meta["example_value"]``, as Dynamo leaves it; nodes emitted here get one as well.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import debug_unwrap
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

from dbf_compile import ops as _ops  # noqa: F401  # defines the dbf:: operators
from dbf_compile.errors import GraphInvariantError

# Where a node comes from: a new node takes this over from the node that it replaces.
PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "custom")


OpOverload = type(torch.ops.aten.add.Tensor)
OpOverloadPacket = type(torch.ops.aten.add)

# The product with signs, as modules call it and as passes emit it.
SIGN_MATMUL = (torch.ops.dbf.sign_matmul, torch.ops.dbf.sign_matmul.default)


class Weight(NamedTuple):
    """A constant weight in a graph.

    Args:
        node: the node of the tensor.
        transposed: the tensor is stored as [K, N].
    """

    node: Node
    transposed: bool


class FactorNodes(NamedTuple):
    """The nodes of the five tensors of a factorization, see ``DoubleBinaryFactors``; signs are interleaved."""

    signs_in: Node
    signs_out: Node
    scale_in: Node
    scale_mid: Node
    scale_out: Node


class WeightSource(Protocol):
    """The weights of a graph; the passes themselves know nothing of bits, files or names."""

    def is_constant(self, node: Node) -> bool:
        """Return whether ``node`` is a tensor that stays the same in all calls, such as a parameter."""

    def group(self, weight: Weight) -> Hashable | None:
        """Return None if the weight stays dense; weights with equal keys may be factored as one."""

    def factors(self, requests: Sequence[tuple[Weight, ...]]) -> list[FactorNodes]:
        """Return the factors of each stack of weights, as placeholders of the graph."""


def example_value(node: Node) -> Any:
    """Return the fake value of a node.

    Raises:
        GraphInvariantError: the node carries none.
    """
    if "example_value" in node.meta:
        return node.meta["example_value"]
    if "val" in node.meta:  # exported graphs
        return node.meta["val"]
    raise GraphInvariantError(
        f"node {node.format_node()} without an example value",
        "meta['example_value'], a fake tensor, on every node",
        "propagate fake tensors through the graph first",
    )


def is_tensor(node: object, dims: int | None = None) -> bool:
    """Return whether ``node`` is a node whose value is a tensor, of ``dims`` dimensions if given; nested ones have none."""
    if not isinstance(node, Node):
        return False
    value = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(value, Tensor) and not value.is_nested and (dims is None or value.dim() == dims)


def on_gpu(x: Tensor) -> bool:
    """Return whether a (fake) tensor is on a device of the Triton kernels."""
    return x.device.type == "cuda"


def is_linear(node: Node) -> bool:
    """Return whether ``node`` is ``linear(x, weight, bias)`` in the canonical form of ``find_linears``."""
    is_call = node.op == "call_function" and node.target is torch.nn.functional.linear
    return is_call and len(node.args) == 3 and is_tensor(node)


def weights_of(node: object, source: WeightSource) -> tuple[Weight, ...] | None:
    """Return the weights in an expression: a constant, its transpose, or a stack of these along the rows.

    Args:
        node: the weight argument of a linear.
        source: knows which nodes are constant.

    Returns:
        The weights from top to bottom, or None if ``node`` is anything else.
    """
    if not isinstance(node, Node):
        return None
    if is_cat(node):
        stack = [weights_of(item, source) for item in node.args[0]]  # type: ignore[union-attr]
        return None if None in stack else tuple(weight for weights in stack if weights for weight in weights)
    inner = transposed_operand(node)
    if inner is not None:
        return (Weight(inner, True),) if source.is_constant(inner) and is_tensor(inner, 2) else None
    return (Weight(node, False),) if source.is_constant(node) and is_tensor(node, 2) else None


def only_linears_read(weight: Node) -> bool:
    """Return whether only linear layers read a weight, directly or through transposes and stacks.

    If an embedding also reads it, as with a tied output head, the dense tensor has to stay in memory anyway.
    """
    return all(
        only_linears_read(user)
        if is_cat(user) or transposed_operand(user) is weight
        else is_linear(user) and user.args[1] is weight and user.args[0] is not weight
        for user in weight.users
    )


def is_cat(node: Node) -> bool:
    """Return whether ``node`` stacks matrices along their rows."""
    return (
        node.op == "call_function" and node.target is torch.cat and node.args[1:] == (0,) and not node.kwargs
    )


def transposed_operand(node: Node) -> Node | None:
    """Return x where ``node`` is the transpose of the matrix x in any spelling, else None."""
    if node.kwargs or not node.args or not is_tensor(node.args[0], 2):
        return None
    name, rest = called_name(node), node.args[1:]
    if name == "getattr":
        name, rest = str(rest[0]), ()
    dims = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if name in ("t", "T", "mT", "numpy_T"):
        swaps = not dims
    elif name in ("transpose", "swapaxes", "permute"):
        # transpose(0, 1) and transpose(1, 0) both swap; permute(0, 1) changes nothing.
        order = tuple(dim % 2 for dim in dims if isinstance(dim, int))
        swaps = order == (1, 0) or (order == (0, 1) and name != "permute")
    else:
        swaps = False
    operand = node.args[0]
    return operand if swaps and isinstance(operand, Node) else None


def called_name(node: Node) -> str:
    """Return the name of the function or method that ``node`` calls; of an aten overload, that of the operator."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket.__name__)
    return getattr(node.target, "__name__", "")


def arguments_of(node: Node) -> dict[str, Any]:
    """Return the arguments of a call of an operator by name, defaults filled in."""
    target: Any = node.target
    if not isinstance(target, OpOverload):
        target = target.default
    positional = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return defaults | positional | node.kwargs


def is_pure(node: Node) -> bool:
    """Return whether ``node`` is known to write to no memory.

    Known are operators, by their schemas, and the functions and methods of torch and of Python's operators, by their
    names. Every other call counts as impure: a function of the user, or a higher-order operator with its bodies.
    """
    target: Any = node.target
    if "out" in node.kwargs:
        return False
    if isinstance(target, OpOverload):
        return not _writes(target, node)
    if isinstance(
        target, OpOverloadPacket
    ):  # Dynamo leaves the choice of an overload open where the model does
        return not any(_writes(getattr(target, name), node) for name in target.overloads())
    if node.op == "call_function" and not _is_documented(target):
        return False
    return node.op != "call_module" and not writes_in_place(node)


def writes_in_place(node: Node) -> bool:
    """Return whether ``node`` calls a function or method that, by its name or a flag, writes to one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = called_name(node)
    # Norms update running statistics, which the schema of no Python function tells.
    return _is_in_place(name) or name in ("batch_norm", "instance_norm") or _is_told_to_write(node)


def mutated_by(node: Node) -> tuple[Node, ...]:
    """Return the nodes whose memory ``node`` may write to: all that an impure node reads."""
    return () if is_pure(node) else tuple(node.all_input_nodes)


def _is_documented(function: Any) -> bool:
    """Return whether a function is one of torch or of Python's operators, which keep to their conventions of names."""
    return (
        function is getattr
        or getattr(function, "__module__", None) == "_operator"
        or resolve_name(function) is not None
    )


def _writes(overload: Any, node: Node) -> bool:
    """Return whether the schema of an operator says that a call writes to one of its arguments."""
    return any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and (not argument.kwarg_only or argument.name in node.kwargs)
        for argument in overload._schema.arguments
    )


def _is_in_place(name: str) -> bool:
    """Return whether this is the name of a write to the first argument: add_, iadd, __iadd__, setitem."""
    bare = name.strip("_")
    trailing = (
        name.endswith("_") and not name.endswith("__") and not hasattr(operator, name)
    )  # as operator.and_
    return (
        trailing
        or bare in ("setitem", "delitem")
        or (bare[:1] == "i" and hasattr(operator, f"__{bare[1:]}__"))
    )


def _is_told_to_write(node: Node) -> bool:
    """Return whether ``inplace`` or ``max_norm``, which scales rows of an embedding, is set, by name or position."""
    if any(node.kwargs.get(flag) for flag in _WRITING_FLAGS):
        return True
    if not callable(node.target):
        return False
    positions = _positions_of_flags(node.target)
    return any(position < len(node.args) and bool(node.args[position]) for position in positions)


_WRITING_FLAGS = ("inplace", "max_norm")


@cache
def _positions_of_flags(function: Callable[..., Any]) -> tuple[int, ...]:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return ()
    return tuple(names.index(flag) for flag in _WRITING_FLAGS if flag in names)


def storage_of(node: Node) -> Hashable:
    """Return a key of the memory of a tensor; views of one tensor have equal keys."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, Tensor) and value.layout == torch.strided:
        key: int = StorageWeakRef(debug_unwrap(value).untyped_storage()).cdata
        return key
    return node


def mutated_storages(nodes: Sequence[Node]) -> set[Hashable]:
    """Return the keys of all memory that ``nodes`` may write to."""
    return {storage_of(target) for node in nodes for target in mutated_by(node)}


def emit(node: Node, function: Callable[..., Tensor], *args: Any) -> Node:
    """Run ``function`` on the fake values of ``args``, and insert the calls that it makes before ``node``.

    Args:
        node: where to insert; new nodes take over its provenance.
        function: any function of tensors.
        args: of ``function``; nodes, also inside lists, are replaced by their values.

    Returns:
        The node of the result.
    """
    recorder = _Recorder(node)
    values = map_arg(args, recorder.value_of)
    with _autocast_of(node), recorder:
        result = function(*values)
    return recorder.node_of(result)


class _Recorder(TorchFunctionMode):
    """Inserts every call of a torch function into the graph, before ``anchor``."""

    def __init__(self, anchor: Node) -> None:
        super().__init__()
        self._anchor = anchor
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # ids are only unique among living objects

    def value_of(self, node: Node) -> Any:
        value = example_value(node)
        plain = debug_unwrap(value)
        if plain is not value:  # torch.func has left; nothing can be computed with its tensors any more
            value = plain.new_empty(value.shape)
        self._remember(value, node)
        return value

    def node_of(self, value: Tensor) -> Node:
        return self._nodes[id(value)]

    def _remember(self, value: Any, node: Node) -> None:
        self._nodes[id(value)] = node
        self._alive.append(value)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Sizes and dtypes are no nodes; a cast to the same dtype returns its argument.
        if not isinstance(result, Tensor) or id(result) in self._nodes:
            return result
        is_method = isinstance(func, type(Tensor.mul))
        graph = self._anchor.graph
        node_args, node_kwargs = map_aggregate(
            (args, kwargs), lambda item: self.node_of(item) if isinstance(item, Tensor) else item
        )
        with graph.inserting_before(self._anchor):
            node = graph.create_node(
                "call_method" if is_method else "call_function",
                func.__name__ if is_method else func,
                node_args,
                node_kwargs,
            )
        node.meta.update({key: self._anchor.meta[key] for key in PROVENANCE if key in self._anchor.meta})
        node.meta["example_value"] = result
        self._remember(result, node)
        return result


def _autocast_of(node: Node) -> AbstractContextManager[Any]:
    """Return the autocast state under which ``node`` runs, inferred from the dtypes of its first input and its output."""
    if not is_tensor(node) or not node.args or not is_tensor(node.args[0]):
        return nullcontext()
    output, first = example_value(node), example_value(node.args[0])  # type: ignore[arg-type]
    lower = output.dtype in (torch.float16, torch.bfloat16) and first.dtype != output.dtype
    return torch.autocast(output.device.type, dtype=output.dtype if lower else None, enabled=lower)


def replace(node: Node, by: Node) -> None:
    """Let all users of ``node`` read ``by``, then remove ``node`` and the inputs that only it read.

    ``by`` takes over the fake value: the views of ``node`` are known to be in its memory. Call it outside of
    ``inserting_before(node)``: nodes inserted next to an erased one are lost.
    """
    by.meta.update({key: node.meta[key] for key in ("example_value", "val") if key in node.meta})
    node.replace_all_uses_with(by)
    remove_unused(node)


def remove_unused(node: Node) -> None:
    """Erase ``node`` if it is pure, no placeholder, and nobody reads it; then its inputs likewise."""
    if node.users or node.op in ("placeholder", "output") or not is_pure(node):
        return
    inputs = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for item in inputs:
        remove_unused(item)
