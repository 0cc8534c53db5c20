"""Allow the fast sums of the CPU kernels: a relative error of 1e-4 instead of that of float32.

sign_matmul(..., fast=False)  ->  sign_matmul(..., fast=True)
"""

from __future__ import annotations

from torch.fx import Graph

from dbf_compile.passes.graph import SIGN_MATMUL, WeightSource, arguments_of


def allow_fast_sums(graph: Graph, source: WeightSource | None = None) -> int:
    """Mark every product with signs that is not marked yet.

    Args:
        graph: changed in place.
        source: unused; every pass takes the same arguments.

    Returns:
        The number of products marked.
    """
    marked = 0
    for node in graph.nodes:
        if node.target in SIGN_MATMUL and not arguments_of(node)["fast"]:
            node.args = node.args[:7]  # those before ``fast``
            node.kwargs = {**node.kwargs, "fast": True}
            marked += 1
    return marked
