"""Replace linear layers by their double binary form.

linear(x, weight, bias)  ->  scale_out ⊙ (signs_out · (scale_mid ⊙ (signs_in · (scale_in ⊙ x)))) + bias
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from dbf_compile.ops import double_binary_linear
from dbf_compile.passes.graph import (
    Weight,
    WeightSource,
    emit,
    example_value,
    is_linear,
    mutated_storages,
    only_linears_read,
    replace,
    storage_of,
    weights_of,
)


def replace_linears(graph: Graph, source: WeightSource) -> int:
    """Replace every linear layer that the source factors; one request asks for all factors.

    Args:
        graph: in the form that ``find_linears`` leaves; changed in place.
        source: gives the factors.

    Returns:
        The number of replaced layers.
    """
    written = mutated_storages(list(graph.nodes))
    sites: list[tuple[Node, tuple[Weight, ...]]] = []
    for node in graph.nodes:
        weights = can_replace_linears(node, source, written)
        if weights is not None and should_replace_linears(weights, source):
            sites.append((node, weights))
    # Each stack is asked for once: a layer may be called twice.
    requests = list(dict.fromkeys(weights for _, weights in sites))
    factors = dict(zip(requests, source.factors(requests), strict=True)) if requests else {}
    for node, weights in sites:
        x, _, bias = node.args
        dtype = example_value(node).dtype
        replace(node, emit(node, double_binary_linear, x, *factors[weights], bias, dtype, True))
    return len(sites)


def can_replace_linears(node: Node, source: WeightSource, written: set[object]) -> tuple[Weight, ...] | None:
    """Return the constant floating-point weights of a linear layer, or None if it has others or the graph writes to one."""
    weights = weights_of(node.args[1], source) if is_linear(node) else None
    if weights is None or any(storage_of(weight.node) in written for weight in weights):
        return None
    return weights if example_value(node).dtype in _DTYPES else None


def should_replace_linears(weights: tuple[Weight, ...], source: WeightSource) -> bool:
    """Return whether the source factors these weights as one, and only linear layers read them."""
    keys = {source.group(weight) for weight in weights}
    return len(keys) == 1 and None not in keys and all(only_linears_read(weight.node) for weight in weights)


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
