"""Let linear layers that read one input become one: q/k/v, gate/up.

    linear(x, w1, b1), linear(x, w2, b2)  ->  y = linear(x, cat([w1, w2]), cat([b1, b2]));  narrow(y), narrow(y)

The stack is factored as one weight, so that the parts share their first stage: one product with ``signs_in``
instead of several, and a taller matrix loses less at equal bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from dbf_compile.passes.graph import (
    WeightSource,
    emit,
    example_value,
    is_cat,
    is_linear,
    mutated_by,
    mutated_storages,
    replace,
    storage_of,
    weights_of,
)


def merge_shared_inputs(graph: Graph, source: WeightSource) -> int:
    """Stack linear layers that read the same input and that the source factors together.

    Args:
        graph: in the form that ``find_linears`` leaves; changed in place.
        source: knows which weights may be factored as one.

    Returns:
        The number of stacks made.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    written = mutated_storages(list(order))
    groups: dict[Hashable, list[Node]] = {}
    for node in order:
        key = should_merge_shared_inputs(node, source, written)
        if key is not None:
            groups.setdefault((node.args[0], key), []).append(node)
    merged = 0
    for siblings in groups.values():
        if len(siblings) > 1 and can_merge_shared_inputs(siblings, order):
            _merge(siblings)
            merged += 1
    return merged


def can_merge_shared_inputs(siblings: Sequence[Node], order: dict[Node, int]) -> bool:
    """Return whether ``siblings`` may be computed where the first one stands.

    Illegal if x may change between the first and the last, or if a weight or a bias is only made after the first.
    """
    nodes = list(order)
    first, last = order[siblings[0]], order[siblings[-1]]
    x = siblings[0].args[0]
    assert isinstance(x, Node)
    if storage_of(x) in mutated_storages(nodes[first:last]):
        return False
    inputs = {item for node in siblings for item in _with_ancestors(node) if item is not x}
    return all(order[item] < first for item in inputs)


def should_merge_shared_inputs(node: Node, source: WeightSource, written: set[Hashable]) -> Hashable | None:
    """Return the key under which the layer may meet its siblings, or None if it stays alone."""
    if not is_linear(node) or is_cat(node.args[1]):  # type: ignore[arg-type]
        return None
    weights = weights_of(node.args[1], source)
    if weights is None or any(storage_of(weight.node) in written for weight in weights):
        return None
    key = source.group(weights[0])
    # Under autocast, equal inputs can still give outputs of several dtypes.
    return None if key is None else (key, example_value(node).dtype)


def _with_ancestors(linear: Node) -> set[Node]:
    # Weights are a transpose away from their placeholder; a bias may be any expression, made before the linear.
    found = {item for item in linear.args[1:] if isinstance(item, Node)}
    return found | {item for node in found for item in node.all_input_nodes}


def _merge(siblings: Sequence[Node]) -> None:
    weights, biases = [node.args[1] for node in siblings], [node.args[2] for node in siblings]
    rows = [example_value(node).shape[-1] for node in siblings]
    first = siblings[0]
    stacked = emit(first, _stacked_linear, first.args[0], weights, biases)
    start = 0
    for node, count in zip(siblings, rows, strict=True):
        replace(node, emit(node, torch.narrow, stacked, -1, start, count))
        start += count


def _stacked_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return F.linear(x, torch.cat(list(weights), 0), None)
    filled = [known.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return F.linear(x, torch.cat(list(weights), 0), torch.cat(filled, 0))
