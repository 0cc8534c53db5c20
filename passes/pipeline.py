"""The passes in their order; running them twice does nothing the second time."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from dbf_compile.passes.find_linears import find_linears
from dbf_compile.passes.graph import WeightSource
from dbf_compile.passes.merge_shared_inputs import merge_shared_inputs
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


def run_pipeline(graph: Graph, source: WeightSource) -> dict[str, int]:
    """Run all passes over ``graph``, in place, and return the number of rewrites of each by its name."""
    return {step.__name__: step(graph, source) for step in PIPELINE}
