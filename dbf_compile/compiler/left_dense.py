"""Tells the user, once, which linear layers of a model a compilation has left dense, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.fx import GraphModule, Node
from torch.nn.parameter import is_lazy

from dbf_compile.candidates.dense import linears
from dbf_compile.candidates.reasons import is_by_rule, left_dense, say_once
from dbf_compile.compiler import dynamo
from dbf_compile.compiler.graph_weights import GraphWeights
from dbf_compile.linear import DoubleBinaryLinear, dense_weight
from dbf_compile.passes.graph import (
    SIGN_MATMUL,
    Weight,
    example_value,
    is_tensor,
    mutated_storages,
    storage_of,
    transposed_operand,
)

_log = logging.getLogger(__name__)

_LINEAR = ("linear",)
_PRODUCTS = ("mm", "matmul", "__matmul__", "addmm")
# Operators that multiply by several matrices or compute with them in a form of their own.
_WHOLE_MODULES = (
    *("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    *("gru", "lstm", "rnn_tanh", "rnn_relu", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("bilinear", "bmm", "baddbmm", "einsum", "grouped_mm", "_grouped_mm"),
)
_NO_VERSIONS = (
    "dbf: weights made under torch.inference_mode count no versions: a later write to few of their entries is not noticed; "
    "make the model outside of it, and call it inside"
)


class _Dense(NamedTuple):
    """A layer that was left dense."""

    name: str
    reason: str

    @property
    def by_rule(self) -> bool:
        return is_by_rule(self.reason)


def tell_left_dense(gm: GraphModule, weights: GraphWeights) -> None:
    """Log what a graph leaves dense: as a warning if that is less than was asked for, once for a model and reasons.

    Args:
        gm: the graph as Dynamo captured it.
        weights: of the same graph, after the passes ran.
    """
    dense = list(
        {layer.name: layer for layer in _left_dense(gm, weights)}.values()
    )  # one weight may be read twice
    factored = sum(len(stack.positions) for stack in weights.stacks)
    surprise = any(not layer.by_rule for layer in dense)
    if not factored and not surprise and not _is_part(gm, dense, weights):
        surprise = bool(dense) or weights.model is not None
    if dense or surprise:
        _say(weights, _message(dense, factored, weights), logging.WARNING if surprise else logging.INFO)
    read = (weights.inputs[position] for stack in weights.stacks for position in stack.positions)
    if any(weight.is_inference() for weight in read):
        _say(weights, _NO_VERSIONS, logging.WARNING)


def _message(dense: Sequence[_Dense], factored: int, weights: GraphWeights) -> str:
    if not dense:
        return f"dbf: no linear layer to factor in {type(getattr(weights.model, '_orig_mod', weights.model)).__name__}"
    return f"dbf: {left_dense(weights.model, factored, {layer.name: layer.reason for layer in dense})}"


def _say(weights: GraphWeights, message: str, level: int) -> None:
    if weights.model is None:
        _log.log(level, "%s", message)
    else:
        say_once(weights.model, message, level)


def _is_part(gm: GraphModule, dense: Sequence[_Dense], weights: GraphWeights) -> bool:
    """Return whether a graph is a part of a model that has factors elsewhere, as where graphs break."""
    if any(node.target in SIGN_MATMUL or _called(node) == "double_binary_linear" for node in gm.graph.nodes):
        return True
    if weights.model is None:
        return not dense
    if any(isinstance(module, DoubleBinaryLinear) for module in weights.model.modules()):
        return True
    here = {layer.name for layer in dense}
    return any(
        weights.factorizer.why_dense(name, dense_weight(module)) is None
        for name, module in linears(weights.model).items()
        if name not in here and not is_lazy(dense_weight(module))
    )


def _left_dense(gm: GraphModule, weights: GraphWeights) -> Iterator[_Dense]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    # The passes have rewritten a copy of the graph, whose first inputs are the same.
    copies = dict(zip(placeholders, weights.placeholders, strict=True))
    factored = {weights.placeholders[position] for stack in weights.stacks for position in stack.positions}
    written = mutated_storages(list(gm.graph.nodes))
    for node in gm.graph.nodes:
        for operand, transposed in _matrices_read(node):
            inner = transposed_operand(operand)
            stored = operand if inner is None else inner
            if copies.get(stored) in factored:
                continue
            reason = _reason_of_node(node, stored, written)
            if reason is None:
                copy = Weight(copies[stored], transposed ^ (inner is not None))
                reason = weights.why_dense(copy) or _reason_of_readers(stored)
            yield _Dense(weights.name_of(copies.get(stored, stored)), reason)
        for body in _bodies(gm, node):
            for inside in body.graph.nodes:
                for operand, _ in _matrices_read(inside, within=True):
                    yield _Dense(f"{_called(node)}: {operand.name}", "in a subgraph")


def _matrices_read(node: Node, within: bool = False) -> Iterator[tuple[Node, bool]]:
    """Yield the weights that a node multiplies by, and whether they are transposed there."""
    called = _called(node)
    operands = [item for item in (*node.args, *node.kwargs.values()) if isinstance(item, Node)]
    if called in _LINEAR:
        weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        if isinstance(weight, Node):
            yield weight, False
    elif called in _PRODUCTS and operands and not within:
        if _is_parameter(operands[-1]):
            yield operands[-1], True
    elif called in _WHOLE_MODULES:
        for operand in node.all_input_nodes:
            if _is_parameter(operand) and example_value(operand).dim() > 1:
                yield operand, False


def _is_parameter(node: Node) -> bool:
    inner = transposed_operand(node)
    return is_tensor(node) and dynamo.is_static_input(node if inner is None else inner)


def _bodies(gm: GraphModule, node: Node) -> list[GraphModule]:
    """Return the subgraphs that a higher-order operator such as torch.cond or a checkpoint runs."""
    names = [item.target for item in node.all_input_nodes if item.op == "get_attr"]
    modules = [getattr(gm, name, None) for name in names if isinstance(name, str)]
    return [module for module in modules if isinstance(module, GraphModule)]


def _reason_of_node(node: Node, stored: Node, written: set[Any]) -> str | None:
    """Return why the passes cannot replace a product, or None if they could."""
    if _called(node) in _WHOLE_MODULES:
        return f"in {_called(node)}"
    if stored.op != "placeholder":
        return f"with a weight computed by {_called(stored)}"
    if not dynamo.is_static_input(stored):
        return "with a weight that is an argument of the call"
    return "with a weight that the graph writes to" if storage_of(stored) in written else None


def _reason_of_readers(stored: Node) -> str:
    for user in stored.users:
        if _called(user) == "embedding":
            return "that an embedding reads, too"
        if not any(operand in (stored, user) for operand, _ in _matrices_read(user)) and (
            transposed_operand(user) is not stored
        ):
            return f"{_called(user)} reads it, too"
    return "in a form that is not rewritten"


def _called(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target))
