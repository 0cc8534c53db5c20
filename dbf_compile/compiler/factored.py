"""Factors of weights: made once per weight and state, used by every graph that reads it.

Memory tells one weight from another: its address, and whether its storage still lives. A reference to the tensor itself
would keep ``torch.utils.swap_tensors`` from exchanging it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dbf_compile.compiler import dynamo
from dbf_compile.compression.jobs import joined
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.errors import ConversionError
from dbf_compile.factors import SIGN_NAMES, DoubleBinaryFactors
from dbf_compile.hashes import tensor_hash
from dbf_compile.signs import interleave

_log = logging.getLogger(__name__)

_SAMPLES = 4  # entries of a weight, spread over it, that are read at every call
_version = attrgetter("_version")


class Stack(NamedTuple):
    """Weights that are factored as one, at fixed positions among the inputs.

    Args:
        names: of the layers, as in the options.
        positions: of the weights among the inputs.
        transposed: for each weight, whether it is stored as [K, N].
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]
    transposed: tuple[bool, ...]

    def weights(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Return the weights as they are stored."""
        return [inputs[position] for position in self.positions]

    def dense(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Return the weights as [N, K]."""
        pairs = zip(self.weights(inputs), self.transposed, strict=True)
        return [weight.detach().T if transposed else weight.detach() for weight, transposed in pairs]


def addresses_of(weights: Iterable[Tensor]) -> tuple[int, ...]:
    """Return where the weights lie in memory."""
    return tuple(map(Tensor.data_ptr, weights))


class WeightState:
    """The memory that weights read, and the state in which it was.

    A write is seen by the version of the tensor. ``weight.data``, NumPy and weights of ``torch.inference_mode`` count no
    versions; on CPUs a sample of the entries shows a write to most of them.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        self._versions = _versions(weights)
        self._samples = [sample for weight in weights for sample in _samples(weight)]
        self._content = b"".join(self._samples)

    def is_alive(self) -> bool:
        """Return whether no address can have gone to another tensor."""
        return not any(storage.expired() for storage in self._storages)

    def matches(self, weights: Sequence[Tensor]) -> bool:
        """Return whether ``weights``, which lie at the same addresses, are the same and unchanged."""
        return (
            self.is_alive()
            and _versions(weights) == self._versions
            and b"".join(self._samples) == self._content
        )


def _versions(weights: Sequence[Tensor]) -> list[int | None]:
    try:
        return list(map(_version, weights))
    except RuntimeError:  # tensors of inference_mode have none
        return [None if weight.is_inference() else weight._version for weight in weights]


def _samples(weight: Tensor) -> list[ctypes.Array[ctypes.c_char]]:
    """Return the bytes of a few large entries, to be read at every call."""
    if weight.device.type != "cpu" or weight.dim() != 2:
        return []
    rows, columns = weight.shape
    if 0 in (rows, columns):
        return []
    size, samples = weight.element_size(), []
    for row in {rows * (2 * index + 1) // (2 * _SAMPLES) for index in range(_SAMPLES)}:
        column = int(weight.detach()[row].float().abs().argmax())
        offset = (row * weight.stride(0) + column * weight.stride(1)) * size
        samples.append((ctypes.c_char * size).from_address(weight.data_ptr() + offset))
    return samples


class Factored(NamedTuple):
    """Factors as the compiled code reads them, and the weights that were factored.

    Args:
        state: of the weights.
        tensors: by name; signs are interleaved.
        content: hashes of the weights, if their factors are ready ones, made from weights that nobody here has seen.
    """

    state: WeightState
    tensors: dict[str, Tensor]
    content: tuple[bytes, ...] | None


Contents = dict[str, tuple[bytes, ...]]  # of the weights of ready factors, by what identifies the factors


class FactorMemory:
    """The factors of all weights that live.

    Dynamo calls the backend several times for one weight: for prefill and decode, for new shapes, for other instances of a
    block, and when it restarts its analysis.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, Factored] = {}
        self._renew_lock()
        if hasattr(os, "register_at_fork"):  # another thread may hold the lock while this one forks
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all factors."""
        with self._lock:
            self._entries.clear()

    def get(
        self, factorizer: LayerFactorizer, stacks: Sequence[Stack], inputs: Sequence[Any], contents: Contents
    ) -> list[Factored]:
        """Return the factors of all stacks; factor those whose weights are new or have changed.

        Args:
            factorizer: makes factors.
            stacks: of a graph.
            inputs: of the graph.
            contents: what the graph has read as the weights of ready factors; extended.

        Raises:
            WeightError: a weight cannot be factored.
            ConversionError: a weight has changed whose factors are ready ones.
        """
        with self._lock, dynamo.outside_transforms():
            self._entries = {key: entry for key, entry in self._entries.items() if entry.state.is_alive()}
            keys = [_key(factorizer, stack, inputs) for stack in stacks]
            missing = {
                key: stack
                for key, stack in zip(keys, stacks, strict=True)
                if key not in self._entries or not self._entries[key].state.matches(stack.weights(inputs))
            }
            before = [self._entries.get(key) for key in missing]
            seen = [
                _content(factorizer, stack, inputs, contents, entry)
                for stack, entry in zip(missing.values(), before, strict=True)
            ]
            # Before the weights are read: who writes to them meanwhile is noticed at the next call.
            states = [WeightState(stack.weights(inputs)) for stack in missing.values()]
            factors = factorizer.make([(stack.names, stack.dense(inputs)) for stack in missing.values()])
            self._entries.update(
                zip(missing, map(Factored, states, map(_as_read, factors), seen), strict=True)
            )
            for (key, stack), entry in zip(missing.items(), before, strict=True):
                if entry is not None and not _equal(entry.tensors, self._entries[key].tensors):
                    _log.warning(
                        "%s: the weight is another one than at compilation; it was factored again",
                        joined(stack.names),
                    )
            return [self._entries[key] for key in keys]


def _content(
    factorizer: LayerFactorizer,
    stack: Stack,
    inputs: Sequence[Any],
    contents: Contents,
    before: Factored | None,
) -> tuple[bytes, ...] | None:
    """Return hashes of the weights of ready factors, None for others; raise if they were other weights before."""
    if not factorizer.is_ready(stack.names):
        return None
    content = tuple(tensor_hash(weight) for weight in stack.weights(inputs))
    first = contents.setdefault(factorizer.identity(stack.names), content)
    if first != content or (before is not None and before.content != content):
        raise ConversionError(
            f"another weight for {joined(stack.names)} than at compilation, and factors from a checkpoint",
            "the weights of the compilation",
            "call torch.compiler.reset() and compile again, or convert the model with "
            "dbf_compile.convert_(model, dbf_compile.load(path))",
        )
    return content


def _key(factorizer: LayerFactorizer, stack: Stack, inputs: Sequence[Any]) -> Hashable:
    weights = stack.weights(inputs)
    forms = tuple((weight.shape, weight.stride(), weight.dtype, weight.device) for weight in weights)
    return (addresses_of(weights), forms, stack.transposed, factorizer.identity(stack.names))


def _as_read(factors: DoubleBinaryFactors) -> dict[str, Tensor]:
    tensors = factors.tensors()
    return tensors | {name: interleave(tensors[name]) for name in SIGN_NAMES}


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())
