"""Check that a graph is legal before it goes to Inductor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dbf_compile.errors import GraphInvariantError
from dbf_compile.passes.graph import SIGN_MATMUL, WeightSource, example_value, storage_of, writes_in_place
from dbf_compile.signs import words_per_row


def verify(graph: Graph, source: WeightSource) -> int:
    """Raise unless the graph is well formed and every product with signs is legal.

    Args:
        graph: any graph; not changed.
        source: unused; every pass takes the same arguments.

    Returns:
        0, as nothing is rewritten.

    Raises:
        GraphInvariantError: a node reads a later one, has no example value, multiplies by signs of a wrong size or
            dtype, or writes to signs.
    """
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        raise GraphInvariantError(
            f"a malformed graph: {error}", "a graph that passes lint()", _PASS_IS_WRONG
        ) from error
    signs: set[object] = set()
    for node in graph.nodes:
        if node.target in SIGN_MATMUL:
            _check_product(node)
            signs.add(storage_of(node.args[1]))
    for node in graph.nodes:
        written = [node.kwargs.get("out"), *(node.all_input_nodes[:1] if writes_in_place(node) else [])]
        if any(isinstance(one, Node) and storage_of(one) in signs for one in written):
            raise GraphInvariantError(
                f"{node.format_node()} writes to signs",
                "signs that are only read",
                "remove the write from the model",
            )
    return 0


_PASS_IS_WRONG = "report this graph: a pass of dbf_compile is wrong"


def _check_product(node: Node) -> None:
    x, signs = (example_value(item) for item in node.args[:2])  # type: ignore[arg-type]
    output = example_value(node)
    cols, rows = x.shape[-1], signs.shape[0]
    legal = (
        signs.dtype == torch.int32
        and signs.dim() == 2
        and signs.shape[1] == words_per_row(cols)
        and isinstance(output, Tensor)
        and output.shape[-1] == rows
    )
    if not legal:
        raise GraphInvariantError(
            f"{node.format_node()}: x {tuple(x.shape)}, signs {signs.dtype} {tuple(signs.shape)}, "
            f"output {tuple(output.shape)}",
            "x [..., K], signs int32 [N, ceil(K / 32)], output [..., N]",
            _PASS_IS_WRONG,
        )
