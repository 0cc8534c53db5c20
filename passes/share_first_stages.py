"""Compute a first stage once that several factored layers have in common.

    sign_matmul(x * scale_in, signs_in)  twice, on the same nodes  ->  once

Layers that were factored as one share ``scale_in``, ``signs_in`` and ``scale_mid``; as modules, each computes its own.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable

import torch
from torch.fx import Graph, Node

from dbf_compile.passes.graph import SIGN_MATMUL, WeightSource, mutated_storages, replace, storage_of

# What stands between the input of a layer and its last product; all of it is pure.
_STEPS = {
    "to": "to",
    "mul": "mul",
    torch.mul: "mul",
    operator.mul: "mul",
    **dict.fromkeys(SIGN_MATMUL, "sign_matmul"),
}


def share_first_stages(graph: Graph, source: WeightSource) -> int:
    """Let equal products with signs, and the scalings around them, be one node.

    Args:
        graph: changed in place.
        source: unused; every pass takes the same arguments.

    Returns:
        The number of products saved.
    """
    written = mutated_storages(list(graph.nodes))
    first: dict[Hashable, Node] = {}
    saved = 0
    for node in list(graph.nodes):
        if not can_share_first_stages(node, written):
            continue
        key = (_STEPS[node.target], node.args, tuple(node.kwargs.items()))
        if (earlier := first.setdefault(key, node)) is not node:
            saved += node.target in SIGN_MATMUL
            replace(node, earlier)
    return saved


def can_share_first_stages(node: Node, written: set[Hashable]) -> bool:
    """Return whether ``node`` is a step of a factored layer on memory that nobody writes to.

    A node that leaves the graph stays: two outputs must not become one tensor.
    """
    if node.target not in _STEPS or any(user.op == "output" for user in node.users):
        return False
    return all(storage_of(item) not in written for item in (node, *node.all_input_nodes))
