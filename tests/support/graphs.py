"""FX graphs built by hand, in the form of Dynamo, and a source of random factors for the passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from support.strategies import random_factors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only

from dbf_compile.compiler import dynamo
from dbf_compile.factors import SIGN_NAMES, DoubleBinaryFactors
from dbf_compile.passes.graph import FactorNodes, Weight
from dbf_compile.signs import interleave


class HandGraph:
    """A graph with the real values of its inputs; it is its own weight source.

    Args:
        group: what ``WeightSource.group`` answers; by default all weights of one K may be factored together.
    """

    def __init__(self, group: Callable[[Weight], Hashable | None] | None = None) -> None:
        self.graph = Graph()
        self.inputs: dict[Node, Tensor] = {}
        self.constants: set[Node] = set()
        self.factored: dict[tuple[Weight, ...], DoubleBinaryFactors] = {}
        self._group = group
        self._fake_mode = FakeTensorMode(shape_env=ShapeEnv())

    # --- building ---

    def input(self, value: Tensor, dynamic: Sequence[int] = ()) -> Node:
        """Add an argument of the call; dimensions in ``dynamic`` have symbolic sizes."""
        placeholders = self.graph.find_nodes(op="placeholder")
        if placeholders:
            with self.graph.inserting_after(placeholders[-1]):
                node = self.graph.placeholder(f"input_{len(self.inputs)}")
        else:
            node = self.graph.placeholder("input_0")
        sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(value.dim())]
        node.meta["example_value"] = self._fake_mode.from_tensor(
            value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
        )
        self.inputs[node] = value
        return node

    def constant(self, value: Tensor) -> Node:
        """Add a parameter."""
        node = self.input(value)
        self.constants.add(node)
        return node

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
        """Add a call of a function, or of a method by its name."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        values, named = tree_map_only(Node, lambda item: item.meta["example_value"], (args, kwargs))
        with torch.no_grad(), dynamo.symbolic_sizes():
            value = (
                getattr(values[0], target)(*values[1:], **named)
                if isinstance(target, str)
                else target(*values, **named)
            )
        node.meta["example_value"] = value
        return node

    def output(self, *nodes: Node) -> None:
        self.graph.output(nodes)

    # --- running ---

    def run(self, **replaced: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on copies of its inputs; ``replaced`` overrides some by name."""
        values = [replaced.get(node.name, value) for node, value in self.inputs.items()]
        self.graph.lint()
        placeholders = self.graph.find_nodes(op="placeholder")
        assert placeholders == list(self.inputs)
        return GraphModule(torch.nn.Module(), self.graph)(*[value.clone() for value in values])

    def run_dense(self, original: HandGraph) -> tuple[Tensor, ...]:
        """Run ``original``, a graph of the same form, with the dense weights of the factors."""
        replaced: dict[str, Tensor] = {}
        for weights, factors in self.factored.items():
            rows = [self.rows(weight) for weight in weights]
            for weight, dense in zip(weights, factors.dense(torch.float64).split(rows), strict=True):
                replaced[weight.node.name] = dense.T if weight.transposed else dense
        return original.run(**replaced)

    # --- what the passes ask ---

    def rows(self, weight: Weight) -> int:
        return self.inputs[weight.node].shape[1 if weight.transposed else 0]

    def is_constant(self, node: Node) -> bool:
        return node in self.constants

    def group(self, weight: Weight) -> Hashable | None:
        return "all" if self._group is None else self._group(weight)

    def factors(self, requests: Sequence[tuple[Weight, ...]]) -> list[FactorNodes]:
        return [self._factors(weights) for weights in requests]

    def _factors(self, weights: tuple[Weight, ...]) -> FactorNodes:
        value = self.inputs[weights[0].node]
        cols = value.shape[0 if weights[0].transposed else 1]
        factors = random_factors(
            cols, 24, sum(self.rows(weight) for weight in weights), seed=len(self.factored)
        )
        self.factored[weights] = factors
        tensors = factors.tensors()
        tensors |= {name: interleave(tensors[name]) for name in SIGN_NAMES}
        return FactorNodes(**{name: self.input(tensor) for name, tensor in tensors.items()})


def targets(graph: Graph) -> list[str]:
    """Return the names of what the graph calls, in order."""
    return [
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    ]
