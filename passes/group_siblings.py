"""Group products of few tokens with several sign matrices into one launch on a GPU.

    sign_matmul(x, signs_q, in_scale, ...), sign_matmul(x, signs_k, in_scale, ...), ...
        ->  y = sign_matmul_group(x, [signs_q, signs_k, ...], in_scale);  y[..., q rows] · out_scale_q + bias_q, ...

Such products are the second stages of layers that were factored as one: q, k and v, or gate and up. A launch takes longer
than one of them. Runs on the graph that Inductor is about to lower, which needs no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

from dbf_compile.kernels.sign_matmul.regimes import is_decode
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

MOST = 4  # sign matrices in one launch


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
            arguments = arguments_of(node)
            key = (arguments["x"], arguments["in_scale"], arguments["fast"])
            siblings.setdefault(key, []).append(node)
    saved = 0
    for nodes in siblings.values():
        for first in range(0, len(nodes), MOST):
            saved += _group(nodes[first : first + MOST])
    return saved


def can_group_siblings(node: Node, written: set[Hashable]) -> bool:
    """Return whether ``node`` is a product of few tokens on a GPU, and the graph writes to none of its inputs."""
    if node.target not in SIGN_MATMUL:
        return False
    arguments = arguments_of(node)
    x = example_value(arguments["x"])
    tokens = math.prod(x.shape[:-1])
    if not on_gpu(x) or x.dtype == torch.float64 or not arguments["interleaved"]:
        return False
    if not is_decode(tokens) or tokens == 0:
        return False
    # The group stands where the first sibling stood, and reads the signs of all.
    return arguments["signs"].op == "placeholder" and all(
        storage_of(item) not in written for item in node.all_input_nodes
    )


def _group(nodes: list[Node]) -> int:
    """Replace siblings by one group, and return the number of launches saved."""
    if len(nodes) < 2:
        return 0
    arguments = [arguments_of(node) for node in nodes]
    signs = [own["signs"] for own in arguments]
    x, in_scale, fast = (arguments[0][name] for name in ("x", "in_scale", "fast"))
    group = _emit(nodes[0], torch.ops.dbf.sign_matmul_group.default, x, signs, in_scale, fast)
    first = 0
    for node, own in zip(nodes, arguments, strict=True):
        rows = int(example_value(own["signs"]).shape[0])
        y = _emit(node, torch.ops.aten.slice.Tensor, group, -1, first, first + rows)
        first += rows
        for vector, op in (
            (own["out_scale"], torch.ops.aten.mul.Tensor),
            (own["bias"], torch.ops.aten.add.Tensor),
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
