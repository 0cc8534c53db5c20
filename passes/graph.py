"""What every pass needs: weights in a graph, aliases, mutation, and emission of new nodes.

Passes rewrite plain torch into plain torch: between any two of them the graph can be run. Every node carries the
fake tensor it stands for in ``meta["example_value"]``, as Dynamo leaves it; nodes emitted here get one as well.
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
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from dbf_compile import ops as _ops  # noqa: F401  # defines the dbf:: operators
from dbf_compile.errors import GraphInvariantError

# What a new node takes over from the node that it replaces: where it came from.
PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "custom")


OpOverload = type(torch.ops.aten.add.Tensor)
OpOverloadPacket = type(torch.ops.aten.add)

# The product with signs, as modules call it and as the passes emit it.
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
    """The nodes of the five tensors of a factorization; see ``DoubleBinaryFactors``.

    Args:
        interleaved: whether the words of both sign matrices lie as kernels read them.
    """

    signs_in: Node
    signs_out: Node
    scale_in: Node
    scale_mid: Node
    scale_out: Node
    interleaved: bool = False


class WeightSource(Protocol):
    """What the passes ask of whoever knows the weights; they know nothing of bits, files or names themselves."""

    def is_constant(self, node: Node) -> bool:
        """Return whether ``node`` is a tensor that does not change between calls, such as a parameter."""

    def group(self, weight: Weight) -> Hashable | None:
        """Return None if the weight stays dense; weights with equal keys may be factored as one."""

    def factors(self, requests: Sequence[tuple[Weight, ...]]) -> list[FactorNodes]:
        """Return the factors of each stack of weights, as nodes at the top of the graph."""


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
    """Return whether ``node`` is a node that stands for a tensor, of ``dims`` dimensions if given."""
    if not isinstance(node, Node):
        return False
    value = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(value, Tensor) and (dims is None or value.dim() == dims)


def on_gpu(x: Tensor) -> bool:
    """Return whether a (fake) tensor lies where the Triton kernels run."""
    return x.device.type == "cuda"


def is_linear(node: Node) -> bool:
    """Return whether ``node`` is ``linear(x, weight, bias)`` in the canonical form of ``find_linears``."""
    return node.op == "call_function" and node.target is torch.nn.functional.linear and len(node.args) == 3


def weights_of(node: object, source: WeightSource) -> tuple[Weight, ...] | None:
    """Read a weight expression: a constant, its transpose, or a stack of such along the rows.

    Args:
        node: the weight argument of a linear.
        source: knows which nodes are constant.

    Returns:
        The weights from top to bottom, or None if ``node`` is anything else.
    """
    if not isinstance(node, Node):
        return None
    if is_cat(node):
        parts = [weights_of(part, source) for part in node.args[0]]  # type: ignore[union-attr]
        return (
            None if any(part is None for part in parts) else tuple(w for part in parts if part for w in part)
        )
    inner = transposed_operand(node)
    if inner is not None:
        return (Weight(inner, True),) if source.is_constant(inner) and is_tensor(inner, 2) else None
    return (Weight(node, False),) if source.is_constant(node) and is_tensor(node, 2) else None


def only_linears_read(weight: Node) -> bool:
    """Return whether all readers of a weight are linear layers, through transposes and stacks at most.

    Where an embedding reads it too, as a tied output head has it, the dense tensor has to stay in memory anyway.
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
    name, rest = _called_name(node), node.args[1:]
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


def _called_name(node: Node) -> str:
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
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return defaults | given | node.kwargs


def mutated_by(node: Node) -> tuple[Node, ...]:
    """Return the nodes whose memory ``node`` may write to."""
    hit: list[Any] = []
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        for schema in _schemas_of(target):
            given = [*zip(schema.arguments, node.args, strict=False)]
            given += [(one, node.kwargs[one.name]) for one in schema.arguments if one.name in node.kwargs]
            hit += [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
    elif getattr(target, "namespace", None) == "higher_order":
        bodies = _bodies_of(node)  # none of a user's Triton kernel, which may write to all that it is given
        hit += node.all_input_nodes if not bodies or any(map(_writes_to_inputs, bodies)) else []
    elif node.op in ("call_method", "call_function") and node.args:
        name = _called_name(node)
        in_place = name.endswith("_") and not name.endswith("__")
        if (
            in_place
            or target is operator.setitem
            or name.strip("_") in _IN_PLACE_OPERATORS
            or _is_told_to_be_in_place(node)
        ):
            hit.append(node.args[0])
    if "out" in node.kwargs:
        hit.append(node.kwargs["out"])
    found: list[Node] = []
    map_arg(hit, found.append)
    return tuple(dict.fromkeys(found))


def _schemas_of(target: Any) -> list[Any]:
    """Return the schema of an operator's overload, or of all overloads where Dynamo left the choice open."""
    if isinstance(target, OpOverload):
        return [target._schema]
    return [getattr(target, name)._schema for name in target.overloads()]


def _bodies_of(node: Node) -> list[GraphModule]:
    """Return the graphs that a higher-order operator such as torch.cond is given."""
    owner = node.graph.owning_module
    named = [one for one in node.all_input_nodes if one.op == "get_attr" and owner is not None]
    values = [operator.attrgetter(str(one.target))(owner) for one in named]
    return [value for value in values if isinstance(value, GraphModule)]


def _writes_to_inputs(body: GraphModule) -> bool:
    given = {storage_of(one) for one in body.graph.nodes if one.op in ("placeholder", "get_attr")}
    return not given.isdisjoint(mutated_storages(list(body.graph.nodes)))


def _is_told_to_be_in_place(node: Node) -> bool:
    """Return whether a function of torch.nn.functional is given ``inplace=True``, by name or position."""
    if "inplace" in node.kwargs or not callable(node.target):
        return bool(node.kwargs.get("inplace"))
    position = _place_of_inplace(node.target)
    return position is not None and position < len(node.args) and bool(node.args[position])


@cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return None
    return names.index("inplace") if "inplace" in names else None


_IN_PLACE_OPERATORS = frozenset(
    [
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "ilshift",
        "irshift",
        "imatmul",
    ]
)


def storage_of(node: Node) -> Hashable:
    """Return a key of the memory that a tensor node lives in; views of one tensor have equal keys.

    What torch.vmap is working on does not tell its memory: all of that has one key, as any of it may be a view of another.
    """
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, Tensor) and value.layout == torch.strided:
        try:
            key: int = StorageWeakRef(value.untyped_storage()).cdata
        except NotImplementedError:
            return "within torch.vmap"
        return key
    return node


def mutated_storages(nodes: Sequence[Node]) -> set[Hashable]:
    """Return the keys of all memory that ``nodes`` write to."""
    return {storage_of(target) for node in nodes for target in mutated_by(node)}


def emit(node: Node, function: Callable[..., Tensor], *args: Any) -> Node:
    """Run ``function`` on the fake values of ``args`` and put what it did in front of ``node``.

    Args:
        node: the new nodes stand before it and take over its provenance.
        function: any function of tensors.
        args: its arguments; nodes stand for their values, also inside lists.

    Returns:
        The node of the result.
    """
    recorder = _Recorder(node)
    with _autocast_of(node), recorder:
        result = function(*map_arg(args, recorder.value_of))
    return recorder.node_of(result)


class _Recorder(TorchFunctionMode):
    """Writes every torch function that is called with known tensors into the graph, before ``anchor``."""

    def __init__(self, anchor: Node) -> None:
        super().__init__()
        self._anchor = anchor
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # ids are only unique among living objects

    def value_of(self, node: Node) -> Any:
        value = example_value(node)
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
        if (
            not isinstance(result, Tensor) or id(result) in self._nodes
        ):  # sizes, dtypes, a cast to the same dtype
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
    """Return the autocast state under which ``node`` runs, told from the dtypes of its first input and its output."""
    if not is_tensor(node) or not node.args or not is_tensor(node.args[0]):
        return nullcontext()
    output, first = example_value(node), example_value(node.args[0])  # type: ignore[arg-type]
    lower = output.dtype in (torch.float16, torch.bfloat16) and first.dtype != output.dtype
    return torch.autocast(output.device.type, dtype=output.dtype if lower else None, enabled=lower)


def replace(node: Node, by: Node) -> None:
    """Let all users of ``node`` read ``by``, then remove ``node`` and what only it needed.

    Placeholders stay. Call it outside of ``inserting_before(node)``: nodes inserted next to an erased one are lost.
    """
    node.replace_all_uses_with(by)
    remove_unused(node)


def remove_unused(node: Node) -> None:
    """Erase ``node`` if nobody reads it, and then its inputs likewise, except placeholders and writing nodes."""
    if node.users or node.op in ("placeholder", "output") or mutated_by(node):
        return
    inputs = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for item in inputs:
        remove_unused(item)
