"""Merge linear layers that read the same input: q/k/v, gate/up.

    linear(x, w1, b1), linear(x, w2, b2)  ->  y = linear(x, cat([w1, w2]), cat([b1, b2]));  narrow(y), narrow(y)

The stacked weight is factored as one, so that the layers share their first stage: one product with ``signs_in`` instead
of several. A taller matrix also loses less at equal bits.

The parts of y are not contiguous, as the results of the layers were: views of them become reshapes, and who sees strides
gets a copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from dbf_compile.passes.graph import (
    OpOverload,
    OpOverloadPacket,
    WeightSource,
    called_name,
    emit,
    example_value,
    is_cat,
    is_linear,
    is_pure,
    mutated_storages,
    only_linears_read,
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
        The number of merged layers.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    written = mutated_storages(list(order))
    groups: dict[Hashable, list[Node]] = {}
    for node in order:
        key = should_merge_shared_inputs(node, source, written)
        if key is not None:
            groups.setdefault((node.args[0], key), []).append(node)
    groups_to_merge = [
        siblings
        for siblings in groups.values()
        if len(siblings) > 1 and can_merge_shared_inputs(siblings, order, source)
    ]
    views: dict[Hashable, list[Node]] = {}
    for node in order if groups_to_merge else ():
        views.setdefault(storage_of(node), []).append(node)
    for siblings in groups_to_merge:
        _merge(siblings, source, views)
    return len(groups_to_merge)


def can_merge_shared_inputs(siblings: Sequence[Node], order: dict[Node, int], source: WeightSource) -> bool:
    """Return whether ``siblings`` may be computed where the first one stands.

    Illegal if x, a weight or a bias may change between the first and the last, or is computed after the first.
    """
    nodes = list(order)
    first, last = order[siblings[0]], order[siblings[-1]]
    x = siblings[0].args[0]
    assert isinstance(x, Node)
    weights = [weight.node for node in siblings for weight in weights_of(node.args[1], source) or ()]
    biases = [node.args[2] for node in siblings if isinstance(node.args[2], Node)]
    changed = mutated_storages(nodes[first:last])
    return all(storage_of(item) not in changed for item in (x, *weights, *biases)) and all(
        order[item] < first for item in (*weights, *biases)
    )


def should_merge_shared_inputs(node: Node, source: WeightSource, written: set[Hashable]) -> Hashable | None:
    """Return the key that the layer has in common with its siblings, or None if it stays alone."""
    if not is_linear(node) or is_cat(node.args[1]):  # type: ignore[arg-type]
        return None
    weights = weights_of(node.args[1], source)
    if weights is None or storage_of(weights[0].node) in written or not only_linears_read(weights[0].node):
        return None
    key = source.group(weights[0])
    # Under autocast, layers of one input may have outputs of several dtypes.
    return None if key is None else (key, example_value(node).dtype)


def _merge(siblings: Sequence[Node], source: WeightSource, views: dict[Hashable, list[Node]]) -> None:
    weights = [weight for node in siblings for weight in weights_of(node.args[1], source) or ()]
    stored, transposed = [weight.node for weight in weights], [weight.transposed for weight in weights]
    rows = [int(example_value(node).shape[-1]) for node in siblings]
    first, biases = siblings[0], [node.args[2] for node in siblings]
    stacked = emit(first, _stacked_linear, first.args[0], stored, transposed, biases)
    start = 0
    for node, count in zip(siblings, rows, strict=True):
        part = emit(node, torch.narrow, stacked, -1, start, count)
        start += count
        if any(_sees_strides(user) for view in views[storage_of(node)] for user in view.users):
            part = emit(node, Tensor.contiguous, part)
        else:
            _let_views_copy(views[storage_of(node)])
        replace(node, part)


def _sees_strides(user: Node) -> bool:
    """Return whether a node that reads a tensor may do something else for other strides of it, or writes to it."""
    if user.op == "output" or not is_pure(user):
        return True
    if isinstance(user.target, (OpOverload, OpOverloadPacket)):
        library, _, operator = str(user.target).partition(".")
        return library not in ("aten", "prims", "dbf") or operator.partition(".")[0] in _SEE_STRIDES
    return called_name(user) in _SEE_STRIDES or (called_name(user) == "view" and _is_bitcast(user))


_SEE_STRIDES = ("as_strided", "view_as_complex", "view_as", "data_ptr")


def _is_bitcast(view: Node) -> bool:
    return isinstance(view.args[1] if len(view.args) > 1 else view.kwargs.get("dtype"), torch.dtype)


def _let_views_copy(views: Sequence[Node]) -> None:
    for view in views:
        if view.target == "view":
            view.target = "reshape"
        elif view.target is torch.ops.aten.view.default:
            view.target = torch.ops.aten.reshape.default


def _stacked_linear(
    x: Tensor, stored: Sequence[Tensor], transposed: Sequence[bool], biases: Sequence[Tensor | None]
) -> Tensor:
    weights = [w.t() if t else w for w, t in zip(stored, transposed, strict=True)]
    first = next((bias for bias in biases if bias is not None), None)
    if first is None:
        return F.linear(x, torch.cat(weights, 0), None)
    filled = [first.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return F.linear(x, torch.cat(weights, 0), torch.cat(filled, 0))
