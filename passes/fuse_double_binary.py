"""Fuse the two products of a factored layer into one call on the CPU.

    h = sign_matmul(x, signs_in, scale_in);  sign_matmul(h, signs_out, scale_mid, scale_out, bias)
        ->  double_binary_linear(x, signs_in, signs_out, scale_in, scale_mid, scale_out, bias)

Runs on the graph that Inductor is about to lower, which needs no gradients.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from dbf_compile.passes.graph import (
    SIGN_MATMUL,
    WeightSource,
    arguments_of,
    example_value,
    mutated_storages,
    replace,
    storage_of,
)


def fuse_double_binary(graph: Graph, source: WeightSource | None = None) -> int:
    """Fuse every pair of products in which only the second reads the first.

    Args:
        graph: changed in place.
        source: unused; every pass takes the same arguments.

    Returns:
        The number of pairs fused.
    """
    fused = 0
    for node in list(graph.nodes):
        if not can_fuse_double_binary(node):
            continue
        second, first = arguments_of(node), arguments_of(node.args[0])
        arguments = (
            *(first["x"], first["signs"], second["signs"]),
            *(first["in_scale"], second["in_scale"], second["out_scale"], second["bias"]),
            *(second["dtype"], second["interleaved"], second["fast"]),
        )
        with graph.inserting_before(node):
            call = graph.call_function(torch.ops.dbf.double_binary_linear.default, arguments)
        call.meta.update(node.meta)
        replace(node, call)
        fused += 1
    return fused


def can_fuse_double_binary(node: Node) -> bool:
    """Return whether ``node`` is the second product of a layer on the CPU, and alone reads the first."""
    if node.target not in SIGN_MATMUL or not isinstance(node.args[0], Node):
        return False
    h = node.args[0]
    if h.target not in SIGN_MATMUL or len(h.users) > 1 or example_value(node).device.type != "cpu":
        return False
    first, second = arguments_of(h), arguments_of(node)
    if first["out_scale"] is not None or first["bias"] is not None:
        return False
    if None in (first["in_scale"], second["in_scale"], second["out_scale"]):
        return False
    if (first["interleaved"], first["fast"]) != (second["interleaved"], second["fast"]):
        return False
    # h must be as wide as the sums, and the inputs of the first product must not change before the second.
    if example_value(h).dtype != torch.promote_types(example_value(first["x"]).dtype, torch.float32):
        return False
    nodes = list(node.graph.nodes)
    between = mutated_storages(nodes[nodes.index(h) : nodes.index(node)])
    return all(storage_of(item) not in between for item in h.all_input_nodes)
