"""Bring every product with a constant weight into one form: ``linear(x, weight, bias)``.

    addmm(bias, x, w)      ->  linear(x, w.t(), bias)         GPT-2's Conv1D
    mm(x, w), x @ w        ->  linear(x, w.t(), None)
    mm(x, w.t()), x @ w.T  ->  linear(x, w, None)
    linear(x, w, bias=b)   ->  linear(x, w, b)                three positional arguments

A product is left alone if its weight is not constant, or if the graph writes to the weight.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from dbf_compile.passes.graph import (
    WeightSource,
    emit,
    example_value,
    is_linear,
    is_tensor,
    mutated_storages,
    replace,
    storage_of,
    transposed_operand,
)


class _Form(NamedTuple):
    """A spelling of a product.

    Args:
        arguments: names of the positional arguments.
        x, weight, bias: which of them is which; bias may be None.
        transposed: the weight argument is [K, N].
    """

    arguments: tuple[str, ...]
    x: str
    weight: str
    bias: str | None
    transposed: bool


_aten = torch.ops.aten
_FORMS: dict[object, _Form] = {
    **dict.fromkeys(
        (F.linear, _aten.linear, _aten.linear.default),
        _Form(("input", "weight", "bias"), "input", "weight", "bias", False),
    ),
    **dict.fromkeys((torch.mm, "mm"), _Form(("input", "mat2"), "input", "mat2", None, True)),
    **dict.fromkeys((_aten.mm, _aten.mm.default), _Form(("self", "mat2"), "self", "mat2", None, True)),
    **dict.fromkeys(
        (torch.matmul, operator.matmul, "matmul", "__matmul__"),
        _Form(("input", "other"), "input", "other", None, True),
    ),
    **dict.fromkeys(
        (_aten.matmul, _aten.matmul.default), _Form(("self", "other"), "self", "other", None, True)
    ),
    torch.addmm: _Form(("input", "mat1", "mat2"), "mat1", "mat2", "input", True),
    **dict.fromkeys(
        (_aten.addmm, _aten.addmm.default), _Form(("self", "mat1", "mat2"), "mat1", "mat2", "self", True)
    ),
}


class _Product(NamedTuple):
    x: Node
    weight: Node  # stored as [K, N] if transposed, else as [N, K]
    transposed: bool
    bias: Node | None


def find_linears(graph: Graph, source: WeightSource) -> int:
    """Rewrite products with constant weights as ``linear(x, weight, bias)``.

    Args:
        graph: nodes carry example values; changed in place.
        source: knows which nodes are constant.

    Returns:
        The number of rewritten nodes.
    """
    written = mutated_storages(list(graph.nodes))
    rewrites = 0
    for node in list(graph.nodes):
        product = _read(node)
        if product is None or is_linear(node) or not can_find_linears(product, source, written):
            continue
        replace(node, emit(node, _linear, product.x, product.weight, product.bias, product.transposed))
        rewrites += 1
    return rewrites


def can_find_linears(product: _Product, source: WeightSource, written: set[object]) -> bool:
    """Return whether the weight is a constant to which the graph does not write, and the bias has one value per output."""
    if not source.is_constant(product.weight) or storage_of(product.weight) in written:
        return False
    out_features = example_value(product.weight).shape[1 if product.transposed else 0]
    return product.bias is None or (
        is_tensor(product.bias, 1) and example_value(product.bias).shape[0] == out_features
    )


def _read(node: Node) -> _Product | None:
    form = _FORMS.get(node.target)
    if form is None:
        return None
    arguments = dict(zip(form.arguments, node.args, strict=False)) | node.kwargs
    unscaled = arguments.pop("beta", 1) == 1 and arguments.pop("alpha", 1) == 1
    x, weight = arguments.pop(form.x, None), arguments.pop(form.weight, None)
    bias = arguments.pop(form.bias, None) if form.bias else None
    # Any other argument, such as out=, makes it another operation.
    if arguments or not unscaled or not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    if not (bias is None or isinstance(bias, Node)) or not is_tensor(x) or not is_tensor(weight, 2):
        return None
    stored = transposed_operand(weight)
    return (
        _Product(x, weight, form.transposed, bias)
        if stored is None
        else _Product(x, stored, not form.transposed, bias)
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)
