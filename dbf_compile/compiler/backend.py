"""The entry point: ``torch.compile(model, backend="dbf", options={...})``.

The factors of dense weights are extra inputs of the compiled code. Dynamo guards neither the identity nor the content of
parameters, and several instances of one block share a compiled graph. So every call checks that its weights are the ones
that were factored, and that they have not changed since.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from dbf_compile.compiler import dynamo, inductor, lowerings
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.errors import ConversionError, TrainingError
from dbf_compile.factors import SIGN_NAMES, DoubleBinaryFactors
from dbf_compile.hashes import tensor_hash
from dbf_compile.options import CompileOptions
from dbf_compile.passes.graph import FactorNodes, Weight, example_value, is_tensor
from dbf_compile.passes.pipeline import run_pipeline, run_post_grad_pipeline
from dbf_compile.records import resolve
from dbf_compile.signs import interleave

_log = logging.getLogger(__name__)


def dbf(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of dense or factored linear layers; called by ``torch.compile``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: of the graph; parameters among them are real tensors.
        mode: of Inductor, as of ``torch.compile``.
        options: fields of ``CompileOptions``, and ``config``, a record of them; single fields win.

    Returns:
        The compiled graph, with the signature of ``gm``.

    Raises:
        OptionError: an unknown option, or one of a wrong type or value.
        TrainingError: a dense weight that would be factored requires a gradient.
    """
    keywords = dict(options or {})
    settings = resolve(CompileOptions, keywords.pop("config", None), keywords)
    patches = {**inductor.mode_settings(mode or settings.mode), **settings.inductor}
    inductor.check_settings(patches)
    lowerings.register()
    factorizer = LayerFactorizer(settings, settings.importance, settings.checkpoint)
    copy = dynamo.copy_graph(gm)
    weights = _GraphWeights(copy, example_inputs, factorizer)
    with dynamo.symbolic_sizes():
        rewrites = run_pipeline(copy.graph, weights, settings.accuracy == "fast")
    _log.info("rewrites by pass: %s", rewrites)
    copy.recompile()
    inputs = [*example_inputs, *weights.fake_inputs]
    compiled = inductor.compile_graph(copy, inputs, patches, weights.fingerprint(), run_post_grad_pipeline)
    return _CheckedCall(compiled, weights, factorizer) if weights.stacks else compiled


def _reset() -> None:
    _factored.clear()
    inductor.reset()


dbf.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


class _Stack(NamedTuple):
    """Weights that are factored as one, at fixed positions among the inputs.

    Args:
        names: of the layers.
        positions: of the weights among the inputs.
        transposed: for each weight, whether it is stored as [K, N].
        identity: a key of everything else that determines the factors.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]
    transposed: tuple[bool, ...]
    identity: str

    def weights(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[position] for position in self.positions]

    def dense(self, inputs: Sequence[Any]) -> list[Tensor]:
        pairs = zip(self.weights(inputs), self.transposed, strict=True)
        return [weight.detach().T if transposed else weight.detach() for weight, transposed in pairs]


class _Snapshot:
    """Which weights were factored, and in which state: identity, version and address of each."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._references = [weakref.ref(weight) for weight in weights]
        self._marks = [_mark(weight) for weight in weights]

    def matches(self, weights: Sequence[Tensor]) -> bool:
        """Return whether ``weights`` are the same tensors, unchanged."""
        return all(
            reference() is weight and _mark(weight) == mark
            for weight, reference, mark in zip(weights, self._references, self._marks, strict=True)
        )


def _mark(weight: Tensor) -> tuple[int, int]:
    # Tensors of inference_mode have no version.
    return (0 if weight.is_inference() else weight._version, weight.data_ptr())


class _Factored(NamedTuple):
    """Factors as the compiled code reads them, and the weights that were factored."""

    weights: _Snapshot
    tensors: dict[str, Tensor]

    @staticmethod
    def from_factors(weights: _Snapshot, factors: DoubleBinaryFactors) -> _Factored:
        tensors = factors.tensors()
        return _Factored(weights, tensors | {name: interleave(tensors[name]) for name in SIGN_NAMES})


# First weight of a stack -> identity of the stack -> factors. Dynamo calls the backend several times for one weight: for
# prefill and decode, for new shapes, for other instances of a block, and when it restarts its analysis.
_factored: MutableMapping[Tensor, dict[str, _Factored]] = WeakTensorKeyDictionary()


def _factor(
    factorizer: LayerFactorizer, stacks: Sequence[_Stack], inputs: Sequence[Any], changed: bool = False
) -> list[_Factored]:
    """Return the factors of all stacks; factor those whose weights are new.

    Args:
        factorizer: makes factors.
        stacks: of the graph.
        inputs: of the graph.
        changed: the graph was compiled with other weights.
    """
    missing = []
    for stack in stacks:
        cached = _factored.get(stack.weights(inputs)[0], {}).get(stack.identity)
        if cached is None or not cached.weights.matches(stack.weights(inputs)):
            missing.append(stack)
    if changed:
        for stack in missing:
            _refuse_or_warn(factorizer, stack)
    snapshots = [_Snapshot(stack.weights(inputs)) for stack in missing]
    factors = factorizer.make([(stack.names, stack.dense(inputs)) for stack in missing])
    for stack, snapshot, stack_factors in zip(missing, snapshots, factors, strict=True):
        by_identity = _factored.setdefault(stack.weights(inputs)[0], {})
        by_identity[stack.identity] = _Factored.from_factors(snapshot, stack_factors)
    return [_factored[stack.weights(inputs)[0]][stack.identity] for stack in stacks]


def _refuse_or_warn(factorizer: LayerFactorizer, stack: _Stack) -> None:
    if factorizer.is_ready(stack.names):
        raise ConversionError(
            f"another weight for {' + '.join(stack.names)} than at compilation, and factors from a checkpoint",
            "the weights of the compilation",
            "compile again, or convert the model with dbf_compile.convert_(model, dbf_compile.load(path))",
        )
    _log.warning("%s: the weight is another one than at compilation; factoring it", " + ".join(stack.names))


class _GraphWeights:
    """The weights of one graph: what passes ask, and the inputs that the factors add to the graph."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], factorizer: LayerFactorizer) -> None:
        self._graph, self._inputs, self._factorizer = gm.graph, inputs, factorizer
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._positions = {
            node: position
            for position, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
            if dynamo.is_static_input(node) and dynamo.is_real(value)
        }
        self._trained = {
            node
            for node, position in self._positions.items()
            if inputs[position].requires_grad and any(_wants_grad(user) for user in node.users)
        }
        self.stacks: list[_Stack] = []
        self.extra: list[tuple[int, str]] = []  # of each added input: index of the stack, name of the tensor
        self.fake_inputs: list[Tensor] = []
        self.factored: list[_Factored] = []

    def is_constant(self, node: Node) -> bool:
        return node in self._positions

    def group(self, weight: Weight) -> Hashable | None:
        tensor = self._inputs[self._positions[weight.node]]
        return self._factorizer.group(_layer_name(weight.node), tensor.T if weight.transposed else tensor)

    def factors(self, requests: Sequence[tuple[Weight, ...]]) -> list[FactorNodes]:
        for weights in requests:
            for weight in weights:
                if weight.node in self._trained:
                    raise _training_error(_layer_name(weight.node))
        for weights in requests:
            names = tuple(_layer_name(weight.node) for weight in weights)
            positions = tuple(self._positions[weight.node] for weight in weights)
            transposed = tuple(weight.transposed for weight in weights)
            self.stacks.append(_Stack(names, positions, transposed, self._factorizer.identity(names)))
        self.factored = _factor(self._factorizer, self.stacks, self._inputs)
        return [self._add_inputs(index, factored) for index, factored in enumerate(self.factored)]

    def _add_inputs(self, index: int, factored: _Factored) -> FactorNodes:
        nodes: dict[str, Node] = {}
        for name, tensor in factored.tensors.items():
            node, fake = dynamo.add_static_input(self._graph, f"dbf_{index}_{name}", tensor)
            nodes[name] = node
            self.fake_inputs.append(fake)
            self.extra.append((index, name))
        return FactorNodes(**nodes, interleaved=True)

    def fingerprint(self) -> str:
        """Return a hash of all factors, and of what lowered programs depend on."""
        digest = hashlib.sha256(lowerings.fingerprint().encode())
        for factored in self.factored:
            for tensor in factored.tensors.values():
                digest.update(tensor_hash(tensor))
        return digest.hexdigest()


class _CheckedCall:
    """Calls the compiled graph with the factors of the weights of this call."""

    def __init__(
        self, compiled: Callable[..., Any], weights: _GraphWeights, factorizer: LayerFactorizer
    ) -> None:
        self._compiled, self._factorizer = compiled, factorizer
        self._stacks, self._extra = weights.stacks, weights.extra
        # Dynamo guards grad mode, not the requires_grad of parameters.
        self._grad_mode = torch.is_grad_enabled()
        self._requires_grad = [
            any(w.requires_grad for w in stack.weights(weights._inputs)) for stack in weights.stacks
        ]
        self._use(weights.factored)

    def _use(self, factored: list[_Factored]) -> None:
        self._factored = factored
        self._tensors = [factored[index].tensors[name] for index, name in self._extra]

    def __call__(self, *inputs: Any) -> Any:
        unchanged = True
        for stack, factored, required in zip(self._stacks, self._factored, self._requires_grad, strict=True):
            weights = stack.weights(inputs)
            if self._grad_mode and not required and any(weight.requires_grad for weight in weights):
                raise _training_error(" + ".join(stack.names))
            unchanged = unchanged and factored.weights.matches(weights)
        if not unchanged:
            self._use(_factor(self._factorizer, self._stacks, inputs, changed=True))
        return self._compiled(*inputs, *self._tensors)


def _layer_name(node: Node) -> str:
    return dynamo.qualified_name(node).rpartition(".")[0]


def _wants_grad(node: Node) -> bool:
    return is_tensor(node) and bool(example_value(node).requires_grad)


def _training_error(name: str) -> TrainingError:
    return TrainingError(
        f"a gradient wanted for the dense weight of {name!r}, which the compiled code does not read",
        "weights without requires_grad, or calls under torch.no_grad() or torch.inference_mode()",
        "call model.requires_grad_(False) first; gradients of activations still work",
    )
