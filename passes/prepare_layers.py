"""Gather what layers of one input need into one input of the graph, on the CPU.

    y_q = layer(x, 5 tensors of q, bias?), y_k = layer(x, 5 tensors of k, bias?), ...
        ->  y = prepared_layers(x, prepared);  y_q = y[..., rows of q], ...

One call takes two tensors instead of dozens, does all of the layers together, and finds scales already in float32. Runs on the
graph of Dynamo. Whoever calls the graph passes what ``prepared`` is made of, see ``ops.prepare_layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dbf_compile.ops import prepared_bytes
from dbf_compile.passes.fuse_double_binary import can_fuse_double_binary
from dbf_compile.passes.graph import arguments_of, emit, example_value, mutated_storages, replace, storage_of


class Prepared(NamedTuple):
    """An input that is made of others.

    Args:
        node: the placeholder.
        factors: placeholders of the five tensors of every layer.
        biases: placeholders, one a layer, or none.
        interleaved: whether the words of signs are interleaved.
    """

    node: Node
    factors: list[Node]
    biases: list[Node]
    interleaved: bool


def prepare_layers(graph: Graph, add_input: Callable[[str, Tensor], Node]) -> list[Prepared]:
    """Replace factored layers, those of one input together; factors that nothing else reads stay as unused placeholders.

    Args:
        graph: changed in place.
        add_input: adds a placeholder for a tensor like this one.
    """
    written = mutated_storages(list(graph.nodes))
    groups: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if not can_fuse_double_binary(node):
            continue
        first, second = arguments_of(_first_product(node)), arguments_of(node)
        tensors = _tensors(node)
        if not all(item.op == "placeholder" for item in tensors) or storage_of(first["x"]) in written:
            continue
        settings = (second["dtype"], second["fast"], second["interleaved"], second["bias"] is None)
        groups.setdefault((first["x"], *settings), []).append(node)
    return [_prepare(nodes, index, add_input) for index, nodes in enumerate(groups.values())]


def _first_product(node: Node) -> Node:
    return node.all_input_nodes[0]


def _tensors(node: Node) -> list[Node]:
    """Return the nodes of a layer's five tensors, and of its bias."""
    first, second = arguments_of(_first_product(node)), arguments_of(node)
    signs, scales = (first["signs"], second["signs"]), (first["in_scale"], second["in_scale"])
    bias = [] if second["bias"] is None else [second["bias"]]
    return [*signs, *scales, second["out_scale"], *bias]


def _prepare(nodes: list[Node], index: int, add_input: Callable[[str, Tensor], Node]) -> Prepared:
    tensors = [_tensors(node) for node in nodes]
    factors = [item for own in tensors for item in own[:5]]
    biases = [item for own in tensors for item in own[5:]]
    rows = [int(example_value(own[1]).shape[0]) for own in tensors]
    size = prepared_bytes([example_value(item) for item in factors], [example_value(item) for item in biases])
    prepared = add_input(f"prepared_{index}", torch.empty(size, dtype=torch.uint8, device="meta"))
    start = _first_product(nodes[0])
    first, second = arguments_of(start), arguments_of(nodes[0])
    operator = torch.ops.dbf.prepared_layers.default
    y = emit(start, operator, first["x"], prepared, sum(rows), second["dtype"], second["fast"])
    at = 0
    for node, count in zip(nodes, rows, strict=True):
        part = y if len(nodes) == 1 else emit(node, torch.narrow, y, -1, at, count)
        at += count
        replace(node, part)
    return Prepared(prepared, factors, biases, bool(second["interleaved"]))
