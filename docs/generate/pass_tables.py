"""Tables of the passes, from the pipeline and the first sentence of each file."""

from __future__ import annotations

import sys

from option_tables import cell

from dbf_compile.passes import pipeline
from dbf_compile.passes.allow_fast_sums import allow_fast_sums
from dbf_compile.passes.prepare_layers import prepare_layers

_PIPELINES = {
    "dynamo": (*pipeline.PIPELINE, allow_fast_sums, prepare_layers),
    "inductor": pipeline.POST_GRAD_PIPELINE,
}


def table(graph: str) -> str:
    """Return the passes in their order, with what each does.

    Args:
        graph: "dynamo" or "inductor": whose graph they rewrite.
    """
    rows = []
    for step in _PIPELINES[graph]:
        sentence = (sys.modules[step.__module__].__doc__ or "").partition("\n\n")[0]
        rows.append(f"| `{step.__name__}` | {cell(sentence)} |")
    return "\n".join(["| pass | what it does |", "|---|---|", *rows])
