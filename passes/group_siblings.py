"""Let products of few tokens with several sign matrices be one launch on a GPU.

    sign_matmul(x, signs_q, in_scale, ...), sign_matmul(x, signs_k, in_scale, ...), ...
        ->  y = sign_matmul_group(x, [signs_q, signs_k, ...], in_scale);  y[..., q rows] · out_scale_q + bias_q, ...

These are the second stages of layers that were factored as one: q, k and v, gate and up. A launch takes longer than such
a product. Runs on the graph that Inductor is about to lower, where gradients are no question any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

from dbf_compile.kernels.sign_matmul.reference import DECODE_TOKENS
from dbf_compile.passes.graph import (
    SIGN_MATMUL,
    WeightSource,
    arguments_of,
    example_value,
    mutated_storages,
    on_gpu,
    replace,
    storage_of,
)

MOST = 4  # matrices in one launch


def group_siblings(graph: Graph, source: WeightSource | None = None) -> int:
    """Group products with the same activations.

    Args:
        graph: changed in place.
        source: unused; every pass takes the same arguments.

    Returns:
        The number of launches saved.
    """
    written = mutated_storages(list(graph.nodes))
    siblings: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if can_group_siblings(node, written):
            given = arguments_of(node)
            siblings.setdefault((given["x"], given["in_scale"], given["fast"]), []).append(node)
    saved = 0
    for nodes in siblings.values():
        for first in range(0, len(nodes), MOST):
            saved += _group(nodes[first : first + MOST])
    return saved


def can_group_siblings(node: Node, written: set[Hashable]) -> bool:
    """Return whether ``node`` is a product of few tokens on a GPU, of memory that nobody writes to."""
    if node.target not in SIGN_MATMUL:
        return False
    given = arguments_of(node)
    x = example_value(given["x"])
    tokens = math.prod(x.shape[:-1])
    if not on_gpu(x) or x.dtype == torch.float64 or not given["interleaved"]:
        return False
    if not isinstance(tokens, int) or not 0 < tokens <= DECODE_TOKENS:
        return False
    # The first of the siblings reads the signs of all.
    return given["signs"].op == "placeholder" and all(
        storage_of(item) not in written for item in node.all_input_nodes
    )


def _group(nodes: list[Node]) -> int:
    if len(nodes) < 2:
        return 0
    given = [arguments_of(node) for node in nodes]
    signs = [one["signs"] for one in given]
    x, in_scale, fast = given[0]["x"], given[0]["in_scale"], given[0]["fast"]
    together = _emit(nodes[0], torch.ops.dbf.sign_matmul_group.default, x, signs, in_scale, fast)
    first = 0
    for node, one in zip(nodes, given, strict=True):
        rows = example_value(one["signs"]).shape[0]
        y = _emit(node, torch.ops.aten.slice.Tensor, together, -1, first, first + rows)
        first += rows
        for vector, op in (
            (one["out_scale"], torch.ops.aten.mul.Tensor),
            (one["bias"], torch.ops.aten.add.Tensor),
        ):
            if vector is not None:
                y = _emit(node, op, y, _cast(node, vector, torch.float32))
        y = _cast(node, y, example_value(node).dtype)
        replace(node, y)
    return len(nodes) - 1


def _cast(before: Node, node: Node, dtype: torch.dtype) -> Node:
    if example_value(node).dtype == dtype:
        return node
    return _emit(before, torch.ops.prims.convert_element_type.default, node, dtype)


def _emit(before: Node, op: Callable[..., Any], *args: Any) -> Node:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(op, args)
    node.meta.update(before.meta)
    value = torch.fx.node.map_arg(args, example_value)
    node.meta["val"] = op(*value)
    node.meta.pop("example_value", None)
    return node
