"""Compute a first stage once if several factored layers have it in common.

    sign_matmul(x, signs_in, scale_in)  twice, on the same nodes  ->  once

Layers that were factored as one share ``scale_in`` and ``signs_in``, but each module computes its own product.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import Graph, Node

from dbf_compile.passes.graph import SIGN_MATMUL, WeightSource, mutated_storages, remove_unused, storage_of


def share_first_stages(graph: Graph, source: WeightSource) -> int:
    """Replace equal products with signs by one node.

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
        if can_share_first_stages(node, written):
            earlier = first.setdefault((node.args, tuple(node.kwargs.items())), node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)
                remove_unused(node)
                saved += 1
    return saved


def can_share_first_stages(node: Node, written: set[Hashable]) -> bool:
    """Return whether ``node`` is a product with signs, and the graph writes neither to its inputs nor to its result.

    A result of the graph stays: two results must not become one tensor.
    """
    if node.target not in SIGN_MATMUL or any(user.op == "output" for user in node.users):
        return False
    return all(storage_of(item) not in written for item in (node, *node.all_input_nodes))
