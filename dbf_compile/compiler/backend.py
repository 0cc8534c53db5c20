"""The entry point: ``torch.compile(model, backend="dbf", options={...})``.

The factors of dense weights reach the compiled code as extra inputs. Dynamo guards neither the identity nor the
content of parameters, and several instances of one block share one compiled graph; so every call checks whose
weights it got, and whether they have changed since they were factored.
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
from dbf_compile.hashes import source_hash, tensor_hash
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.options import CompileOptions, parse
from dbf_compile.passes.graph import FactorNodes, Weight, example_value, is_tensor
from dbf_compile.passes.pipeline import run_pipeline, run_post_grad_pipeline
from dbf_compile.signs import interleave, interleaved_on

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
        example_inputs: its inputs; parameters among them are the real ones.
        mode: mode of Inductor.
        options: fields of ``CompileOptions``.

    Returns:
        The compiled graph, with the signature of ``gm``.

    Raises:
        OptionError: an unknown or ill-typed option.
        TrainingError: a gradient is wanted for a dense weight that would be factored.
    """
    settings = parse(CompileOptions, options or {})
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
    _made.clear()
    inductor.reset()


dbf.reset = _reset  # type: ignore[attr-defined]  # called by torch.compiler.reset()


class _Stack(NamedTuple):
    """Weights at fixed positions among the inputs that are factored as one.

    Args:
        names: of the layers.
        positions: of the weights among the inputs.
        transposed: of each weight, whether it is stored as [K, N].
        identity: of all else that decides on the factors.
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


class _Seen:
    """The weights that factors were made of: identity, version and address of each."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._references = [weakref.ref(weight) for weight in weights]
        self._marks = [_mark(weight) for weight in weights]

    def are(self, weights: Sequence[Tensor]) -> bool:
        """Return whether ``weights`` are these very tensors with their content of then."""
        return all(
            reference() is weight and _mark(weight) == mark
            for weight, reference, mark in zip(weights, self._references, self._marks, strict=True)
        )


def _mark(weight: Tensor) -> tuple[int, int]:
    # Tensors made under inference_mode have no version.
    return (0 if weight.is_inference() else weight._version, weight.data_ptr())


class _Made(NamedTuple):
    """Factors as the compiled code reads them, and the weights that they were made of."""

    of: _Seen
    tensors: dict[str, Tensor]
    interleaved: bool

    @staticmethod
    def from_factors(of: _Seen, factors: DoubleBinaryFactors) -> _Made:
        tensors = factors.tensors()
        interleaved = interleaved_on(factors.scale_in.device)
        if interleaved:
            tensors |= {name: interleave(tensors[name]) for name in SIGN_NAMES}
        return _Made(of, tensors, interleaved)


# first weight -> identity of the stack -> factors. The backend is called several times for one weight: prefill, decode,
# new shapes, restarts of Dynamo's analysis, other instances of a block.
_made: MutableMapping[Tensor, dict[str, _Made]] = WeakTensorKeyDictionary()


def _make(
    factorizer: LayerFactorizer, stacks: Sequence[_Stack], inputs: Sequence[Any], changed: bool = False
) -> list[_Made]:
    """Return the factors of all stacks, made now where the weights were not seen before."""
    missing = []
    for stack in stacks:
        known = _made.get(stack.weights(inputs)[0], {}).get(stack.identity)
        if known is None or not known.of.are(stack.weights(inputs)):
            missing.append(stack)
    if changed:
        for stack in missing:
            _refuse_or_warn(factorizer, stack)
    seen = [_Seen(stack.weights(inputs)) for stack in missing]
    factors = factorizer.make([(stack.names, stack.dense(inputs)) for stack in missing])
    for stack, of, made in zip(missing, seen, factors, strict=True):
        _made.setdefault(stack.weights(inputs)[0], {})[stack.identity] = _Made.from_factors(of, made)
    return [_made[stack.weights(inputs)[0]][stack.identity] for stack in stacks]


def _refuse_or_warn(factorizer: LayerFactorizer, stack: _Stack) -> None:
    if factorizer.is_ready(stack.names):
        raise ConversionError(
            f"another weight for {' + '.join(stack.names)} than at compilation, while its factors came from a checkpoint",
            "the weights that were there at compilation",
            "compile again, or convert the model with dbf_compile.convert_(model, dbf_compile.load(path))",
        )
    _log.warning("%s: the weight is another one than at compilation; factoring it", " + ".join(stack.names))


class _GraphWeights:
    """The weights of one graph, as the passes see them."""

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
        self.extra: list[tuple[int, str]] = []  # per extra input: which stack, which of its tensors
        self.fake_inputs: list[Tensor] = []
        self.made: list[_Made] = []

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
        self.made = _make(self._factorizer, self.stacks, self._inputs)
        return [self._add_inputs(index, made) for index, made in enumerate(self.made)]

    def _add_inputs(self, index: int, made: _Made) -> FactorNodes:
        nodes: dict[str, Node] = {}
        for name, tensor in made.tensors.items():
            node, fake = dynamo.add_static_input(self._graph, f"dbf_{index}_{name}", tensor)
            nodes[name] = node
            self.fake_inputs.append(fake)
            self.extra.append((index, name))
        return FactorNodes(**nodes, interleaved=made.interleaved)

    def fingerprint(self) -> str:
        """Return a hash of the package's sources and of all factors."""
        digest = hashlib.sha256(source_hash("dbf_compile").encode())
        digest.update(repr(cpu_kernel.available()).encode())
        for made in self.made:
            for tensor in made.tensors.values():
                digest.update(tensor_hash(tensor))
        return digest.hexdigest()


class _CheckedCall:
    """Calls the compiled graph with the factors of the very weights that it is called with."""

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
        self._use(weights.made)

    def _use(self, made: list[_Made]) -> None:
        self._made = made
        self._tensors = [made[index].tensors[name] for index, name in self._extra]

    def __call__(self, *inputs: Any) -> Any:
        fresh = True
        for stack, made, required in zip(self._stacks, self._made, self._requires_grad, strict=True):
            weights = stack.weights(inputs)
            if self._grad_mode and not required and any(weight.requires_grad for weight in weights):
                raise _training_error(" + ".join(stack.names))
            fresh = fresh and made.of.are(weights)
        if not fresh:
            self._use(_make(self._factorizer, self._stacks, inputs, changed=True))
        return self._compiled(*inputs, *self._tensors)


def _layer_name(node: Node) -> str:
    return dynamo.qualified_name(node).rpartition(".")[0]


def _wants_grad(node: Node) -> bool:
    return is_tensor(node) and bool(example_value(node).requires_grad)


def _training_error(name: str) -> TrainingError:
    return TrainingError(
        f"a gradient wanted for the dense weight of {name!r}, which the compiled code does not read",
        "weights without requires_grad, or calls under torch.no_grad() or torch.inference_mode()",
        "call model.requires_grad_(False) first; gradients with respect to activations then still work",
    )
