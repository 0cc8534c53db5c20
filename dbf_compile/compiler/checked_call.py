"""Calls of compiled code with the factors of the weights of this call.

Dynamo guards neither the identity nor the content of parameters, and several instances of one block share a compiled
graph. So every call looks at its weights. It keeps no state: threads call one object with the weights of several models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbf_compile.compiler.factored import WeightState, addresses_of
from dbf_compile.compiler.graph_weights import GraphWeights, memory, training_error
from dbf_compile.compiler.layer_names import named_layers
from dbf_compile.compression.jobs import joined
from dbf_compile.errors import ConversionError

_requires_grad = attrgetter("requires_grad")


class _Binding(NamedTuple):
    """Weights, and their factors in the order of the inputs that the passes added."""

    state: WeightState
    tensors: list[Tensor]


class CheckedCall:
    """Calls the compiled graph with the factors of the weights of this call.

    Args:
        compiled: the graph.
        weights: of the compilation.
    """

    def __init__(self, compiled: Callable[..., Any], weights: GraphWeights) -> None:
        self._compiled, self._stacks, self._extra = compiled, weights.stacks, weights.extra
        self._options, self._factorizer = weights.options, weights.factorizer
        factored = [position for stack in self._stacks for position in stack.positions]
        # Of another instance, the options may ask for factors where they skip a layer of this one.
        self._positions, self._count = [*factored, *weights.skipped], len(factored)
        self._contents, self._local = weights.contents, weights.local_names(self._positions)
        # Dynamo guards grad mode, not the requires_grad of parameters.
        self._grad_mode = torch.is_grad_enabled()
        read = [weights.inputs[position] for position in self._positions]
        self._requires_grad = list(map(_requires_grad, read[: self._count]))
        state = WeightState(read[: self._count])
        tensors = [weights.factored[index].tensors[name] for index, name in weights.extra]
        self._shapes = [tensor.shape for tensor in tensors]
        # Replaced, never changed: other threads read it.
        self._bindings = {addresses_of(read): _Binding(state, tensors)}

    def __call__(self, *inputs: Any) -> Any:
        """Return what the graph returns; factor weights that are new or have changed.

        Raises:
            TrainingError: a weight requires a gradient since the compilation.
            ConversionError: weights for which the options ask for another graph, or other ones than those of ready factors.
        """
        read = [inputs[position] for position in self._positions]
        factored = read[: self._count]
        if self._grad_mode and list(map(_requires_grad, factored)) != self._requires_grad:
            self._refuse_gradients(factored)
        binding = self._bindings.get(addresses_of(read))
        if binding is None or not binding.state.matches(factored):
            binding = self._bind(inputs, read)
        return self._compiled(*inputs, *binding.tensors)

    def _bind(self, inputs: Sequence[Any], read: Sequence[Tensor]) -> _Binding:
        """Return a binding for weights that are new here, or have changed."""
        # Another instance of a block has other names.
        layers = named_layers(self._options, self._factorizer.ready_names, read, self._local)
        names = iter(layers.names)
        stacks = [stack._replace(names=tuple(next(names) for _ in stack.names)) for stack in self._stacks]
        for stack in stacks:
            for name, dense in zip(stack.names, stack.dense(inputs), strict=True):
                if reason := self._factorizer.why_dense(name, dense):
                    raise _shares_code(name, f"stays dense ({reason})")
        for name, weight in zip(names, read[self._count :], strict=True):
            if self._factorizer.why_dense(name, weight) is None:
                raise _shares_code(name, "is factored")
        state = WeightState(read[: self._count])
        factored = memory.get(self._factorizer, stacks, inputs, self._contents)
        tensors = [factored[index].tensors[name] for index, name in self._extra]
        for (index, _), tensor, shape in zip(self._extra, tensors, self._shapes, strict=True):
            if tensor.shape != shape:
                raise _shares_code(joined(stacks[index].names), "has other bits")
        binding = _Binding(state, tensors)
        alive = {key: item for key, item in self._bindings.items() if item.state.is_alive()}
        self._bindings = alive | {addresses_of(read): binding}
        return binding

    def _refuse_gradients(self, weights: Sequence[Tensor]) -> None:
        names = [name for stack in self._stacks for name in stack.names]
        for name, weight, before in zip(names, weights, self._requires_grad, strict=True):
            if weight.requires_grad and not before:
                raise training_error(name)


def _shares_code(name: str, difference: str) -> ConversionError:
    return ConversionError(
        f"{name}, which by the options {difference}, runs compiled code that it shares with other layers",
        "the same options for all instances that are compiled as one",
        "compile the whole model instead of its blocks, or convert it with dbf_compile.convert_",
    )
