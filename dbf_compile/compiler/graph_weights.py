"""The weights of one graph: what the passes ask, and the inputs that the factors add to the graph."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dbf_compile.compiler import dynamo, lowerings
from dbf_compile.compiler.factored import Contents, Factored, FactorMemory, Stack
from dbf_compile.compiler.layer_names import named_layers
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.errors import TrainingError
from dbf_compile.hashes import tensor_hash
from dbf_compile.names import plain_name
from dbf_compile.options import USUAL_PATTERNS, CompileOptions
from dbf_compile.passes.graph import (
    FactorNodes,
    Weight,
    example_value,
    is_linear,
    is_tensor,
    transposed_operand,
)

# The factors of all graphs.
memory = FactorMemory()


class GraphWeights:
    """The weights of one graph.

    Args:
        gm: the graph; factors are added to its inputs.
        inputs: of the graph; parameters among them are real tensors.
        options: of the backend.
        factorizer: makes factors.

    Raises:
        OptionError: names in options match no layer of the model.
    """

    def __init__(
        self, gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, factorizer: LayerFactorizer
    ) -> None:
        self._graph, self.inputs, self.options, self.factorizer = gm.graph, inputs, options, factorizer
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self._values: dict[Node, Any] = dict(zip(self.placeholders, inputs, strict=True))
        self.positions = {
            node: position
            for position, (node, value) in enumerate(self._values.items())
            if dynamo.is_static_input(node) and is_plain(value)
        }
        matrices = [node for node in self.positions if self._tensor(node).dim() == 2]
        self._local = {node: dynamo.qualified_name(node).rpartition(".")[0] for node in matrices}
        weights, local = [self._tensor(node) for node in matrices], [self._local[node] for node in matrices]
        layers = named_layers(options, factorizer.ready_names, weights, local, check=True)
        self._names = dict(zip(matrices, layers.names, strict=True))
        self._adapters = {node for node, adapter in zip(matrices, layers.adapters, strict=True) if adapter}
        self.model: nn.Module | None = layers.model
        self._trained = {node for node in self.positions if self._is_trained(node)}
        self.stacks: list[Stack] = []
        self.extra: list[tuple[int, str]] = []  # of each added input: index of the stack, name of the tensor
        self.fake_inputs: list[Tensor] = []
        self.factored: list[Factored] = []
        self.contents: Contents = {}

    def is_constant(self, node: Node) -> bool:
        """Return whether ``node`` is a parameter or buffer with data."""
        return node in self.positions

    def group(self, weight: Weight) -> Hashable | None:
        """Return None if the weight stays dense; weights with equal keys may be factored as one."""
        if self.why_dense(weight) is not None:
            return None
        return self.factorizer.group(self._names[weight.node], self._matrix(weight))

    def why_dense(self, weight: Weight) -> str | None:
        """Return why a matrix stays dense, whoever reads it, or None if it is factored."""
        value = self._values[weight.node]
        if reason := _why_no_matrix(value):
            return reason
        name = self._names[weight.node]
        if weight.node in self._adapters:
            return "an adapter"
        if reason := self.factorizer.why_dense(name, self._matrix(weight)):
            return reason
        named = self.factorizer.is_ready([name]) or name in self.options.importance
        return (
            "read as it is and transposed, but measured or made for one of them"
            if named and _both_ways(weight)
            else None
        )

    def factors(self, requests: Sequence[tuple[Weight, ...]]) -> list[FactorNodes]:
        """Return the factors of each stack of weights, as placeholders of the graph.

        Raises:
            TrainingError: a gradient is wanted for a weight.
        """
        for weights in requests:
            names = tuple(self._names[weight.node] for weight in weights)
            for weight, name in zip(weights, names, strict=True):
                if weight.node in self._trained:
                    raise training_error(name)
            positions = tuple(self.positions[weight.node] for weight in weights)
            self.stacks.append(Stack(names, positions, tuple(weight.transposed for weight in weights)))
        self.factored = memory.get(self.factorizer, self.stacks, self.inputs, self.contents)
        return [self._add_inputs(index, factored) for index, factored in enumerate(self.factored)]

    def fingerprint(self) -> str:
        """Return a hash of all factors, and of what lowered programs depend on."""
        digest = hashlib.sha256(lowerings.fingerprint().encode())
        for factored in self.factored:
            for tensor in factored.tensors.values():
                digest.update(tensor_hash(tensor))
        return digest.hexdigest()

    def name_of(self, node: Node) -> str:
        """Return the name of a layer in messages, by the node of its weight."""
        return (
            self._names.get(node) or plain_name(dynamo.qualified_name(node).rpartition(".")[0]) or node.name
        )

    def local_names(self, positions: Sequence[int]) -> list[str]:
        """Return the names that layers have in the graph."""
        return [self._local[self.placeholders[position]] for position in positions]

    @property
    def skipped(self) -> list[int]:
        """Positions of weights that stay dense because the user's own patterns skip them."""
        patterns = [pattern for pattern in self.options.skip if pattern not in USUAL_PATTERNS]
        return [
            self.positions[node]
            for node, name in self._names.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ]

    def _tensor(self, node: Node) -> Tensor:
        tensor: Tensor = self.inputs[self.positions[node]]
        return tensor

    def _matrix(self, weight: Weight) -> Tensor:
        tensor = self._tensor(weight.node)
        return tensor.T if weight.transposed else tensor

    def _is_trained(self, node: Node) -> bool:
        wants = (is_tensor(user) and example_value(user).requires_grad for user in node.users)
        return self._tensor(node).requires_grad and any(wants)

    def _add_inputs(self, index: int, factored: Factored) -> FactorNodes:
        nodes: dict[str, Node] = {}
        for name, tensor in factored.tensors.items():
            node, fake = dynamo.add_static_input(self._graph, f"dbf_{index}_{name}", tensor)
            nodes[name] = node
            self.fake_inputs.append(fake)
            self.extra.append((index, name))
        return FactorNodes(**nodes)


def is_plain(value: Any) -> bool:
    """Return whether ``value`` is a tensor with data of its own in strides: no fake one, no subclass such as DTensor."""
    if not dynamo.is_real(value) or type(value) not in (Tensor, nn.Parameter) or dynamo.is_transformed(value):
        return False
    return bool(value.layout == torch.strided and not value.is_quantized)


def _why_no_matrix(value: Any) -> str | None:
    """Return why an input is no matrix that could be factored, or None."""
    if is_plain(value):
        return None if value.dim() == 2 else f"of {value.dim()} dimensions"
    if getattr(value, "is_meta", False):
        return "on the meta device"
    if not dynamo.is_real(value):
        return dynamo.WITHOUT_DATA
    if dynamo.is_transformed(value):
        return "with a weight that torch.func batches or differentiates"
    return f"with a weight of the class {type(value).__name__}"


def _both_ways(weight: Weight) -> bool:
    """Return whether linear layers read a matrix as it is, others its transpose."""
    straight = any(is_linear(user) and user.args[1] is weight.node for user in weight.node.users)
    return straight and any(transposed_operand(user) is weight.node for user in weight.node.users)


def training_error(name: str) -> TrainingError:
    """Return the error for a gradient of a weight that compiled code does not read."""
    return TrainingError(
        f"a gradient wanted for the dense weight of {name!r}, which the compiled code does not read",
        "weights without requires_grad, or calls under torch.no_grad() or torch.inference_mode()",
        "call model.requires_grad_(False) first; gradients of activations still work",
    )
