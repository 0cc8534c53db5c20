"""The passes in their order; a second run rewrites nothing.

``PIPELINE`` rewrites the graph that Dynamo captured, ``POST_GRAD_PIPELINE`` the one that Inductor is about to lower.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from dbf_compile.passes.allow_fast_sums import allow_fast_sums
from dbf_compile.passes.find_linears import find_linears
from dbf_compile.passes.fuse_double_binary import fuse_double_binary
from dbf_compile.passes.graph import WeightSource
from dbf_compile.passes.group_siblings import group_siblings
from dbf_compile.passes.merge_shared_inputs import merge_shared_inputs
from dbf_compile.passes.narrow_first_stages import narrow_first_stages
from dbf_compile.passes.replace_linears import replace_linears
from dbf_compile.passes.share_first_stages import share_first_stages
from dbf_compile.passes.verify import verify

Pass = Callable[[Graph, WeightSource], int]

PIPELINE: tuple[Pass, ...] = (
    find_linears,
    merge_shared_inputs,
    replace_linears,
    share_first_stages,
    verify,
)

POST_GRAD_PIPELINE: tuple[Callable[[Graph], int], ...] = (
    fuse_double_binary,
    group_siblings,
    narrow_first_stages,
)


def run_pipeline(graph: Graph, source: WeightSource, fast: bool = False) -> dict[str, int]:
    """Run all passes over ``graph`` in place, and return the number of rewrites of each pass by name.

    Args:
        graph: of Dynamo.
        source: knows the weights.
        fast: allow fast sums.
    """
    passes = (*PIPELINE, allow_fast_sums) if fast else PIPELINE
    return {step.__name__: step(graph, source) for step in passes}


def run_post_grad_pipeline(graph: Graph) -> None:
    """Run the passes over the graph that Inductor is about to lower, in place."""
    for step in POST_GRAD_PIPELINE:
        step(graph)
