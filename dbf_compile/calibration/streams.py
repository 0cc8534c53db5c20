"""Recorded inputs of a transformer's blocks, to run blocks one at a time.

A stack is a row of blocks, each of which reads what the one before returns: encoders and decoders are one each. The model
runs once, up to the last block of a stack. Afterwards each block can be called with the hidden states of any stream (dense
or compressed prefix) and with the other arguments that the model passed it, such as positions, masks and the encoder's
states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import attention_mask, call_model
from dbf_compile.calibration.offload import without_kv_cache
from dbf_compile.errors import ConversionError
from dbf_compile.machine import narrow_products

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Streams:
    """Hidden states before the first block, and the other arguments of every block.

    Args:
        hidden: hidden states of every batch, float32 [batch, tokens, features].
        calls: positional and keyword arguments besides the hidden states, as ``calls[batch][block]``.
        masks: of every batch, which positions are no padding, as bool [batch, tokens]; None without an
            ``attention_mask``.
        narrow: blocks may round what their matrix products multiply to bfloat16, where the device gains by it. Their
            other numbers are float32 ones.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    narrow: bool = False

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return the hidden states that block ``index`` makes of ``hidden``, with the arguments of batch ``batch``."""
        args, kwargs = self.calls[batch][index]
        with narrow_products(hidden.device) if self.narrow else nullcontext():
            output = block(hidden, *args, **kwargs)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result.float()

    @torch.no_grad()
    def for_block(self, block: nn.Module, index: int) -> Streams:
        """Return these streams, narrow only if block ``index`` computes finite numbers that way: few mix dtypes badly."""
        padded = (batch for batch, mask in enumerate(self.masks) if mask is not None and not bool(mask.all()))
        narrow = replace(self, narrow=True)
        try:
            outputs = [narrow.run(block, index, batch, self.hidden[batch]) for batch in {0, next(padded, 0)}]
            return replace(self, narrow=all(bool(torch.isfinite(output).all()) for output in outputs))
        except RuntimeError:
            return replace(self, narrow=False)

    @torch.no_grad()
    def outputs(self, block: nn.Module, index: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the hidden states that block ``index`` makes of ``inputs``, one of every batch."""
        return [self.run(block, index, batch, hidden) for batch, hidden in enumerate(inputs)]

    def counted(self, batch: int, values: Tensor) -> Tensor:
        """Return the rows [T, features] of ``values`` [batch, tokens, features] at positions that are no padding."""
        mask = self.masks[batch]
        if mask is not None and mask.shape == values.shape[:-1]:
            return values[mask.to(values.device)]
        return values.flatten(0, -2)


class _LastBlockError(Exception):
    """Stops the model before its last block computes."""


@torch.no_grad()
def record(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Any]) -> Streams:
    """Run a model once over all batches, and return the arguments that its blocks are called with.

    Args:
        model: in evaluation mode.
        blocks: the model must call each once, in this order, with the output of the block before as first argument.
        batches: as for ``calibrate``.

    Raises:
        ConversionError: the model calls the blocks in another order or way.
    """
    streams = Streams()
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    # Masks and positions that blocks share stay shared. The original is kept, so that its id stays taken.
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def on_call(call: _Call) -> None:
        if call.hidden is None:
            raise _unsupported("a block that is called without hidden states as its first argument")
        if call.block != len(seen):
            raise _unsupported(f"block {call.block}, which is called after {len(seen)} others")
        if seen and not call.linked:
            raise _unsupported(
                f"block {call.block}, which reads something else than block {call.block - 1} returns"
            )
        args, kwargs = _in_float32(call.args, copies), _in_float32(call.kwargs, copies)
        seen.append((call.hidden.float(), args, kwargs))
        if len(seen) == len(blocks):
            raise _LastBlockError

    with without_kv_cache(model), _calls(blocks, on_call):
        for batch in batches:
            seen.clear()
            copies.clear()
            with suppress(_LastBlockError):
                call_model(model, batch)
            if len(seen) != len(blocks):
                raise _unsupported(f"{len(seen)} calls of {len(blocks)} blocks")
            streams.hidden.append(seen[0][0])
            streams.calls.append([(args, kwargs) for _, args, kwargs in seen])
            streams.masks.append(attention_mask(batch))
    return streams


@torch.no_grad()
def stacks_of(model: nn.Module, blocks: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[list[str]]:
    """Return the stacks of a model in the order in which it runs them, as names of blocks.

    Blocks that a batch calls in another way belong to no stack: not at all, several times, or with something else than
    what the block before in their list returns.

    Args:
        model: in evaluation mode.
        blocks: by name, "<list>.<index>"; lists are told by the names.
        batches: as for ``calibrate``; one of every kind will do. Kinds are told by the names of their tensors.
    """
    kinds = {tuple(batch) if isinstance(batch, Mapping) else (): batch for batch in reversed(list(batches))}
    stacks = [_stacks_of_batch(model, blocks, batch) for batch in kinds.values()]
    return [stack for stack in stacks[0] if all(stack in others for others in stacks)] if stacks else []


def _stacks_of_batch(model: nn.Module, blocks: Mapping[str, nn.Module], batch: Any) -> list[list[str]]:
    calls: list[_Call] = []

    def on_call(call: _Call) -> None:
        # Nothing of a whole model's activations is kept.
        nothing = None if call.hidden is None else call.hidden.new_empty(0)
        calls.append(replace(call, hidden=nothing, args=(), kwargs={}))

    with without_kv_cache(model), _calls(list(blocks.values()), on_call):
        call_model(model, batch)
    names = list(blocks)
    times = Counter(call.block for call in calls)
    rows: dict[str, list[int]] = {}  # places in ``calls``, by list
    for place, call in enumerate(calls):
        rows.setdefault(names[call.block].rpartition(".")[0], []).append(place)

    def is_stack(row: list[int]) -> bool:
        return (
            calls[row[0]].hidden is not None
            and all(times[calls[place].block] == 1 for place in row)
            and all(
                place == before + 1 and calls[place].linked and calls[place].block > calls[before].block
                for before, place in pairwise(row)
            )
        )

    return [[names[calls[place].block] for place in row] for row in rows.values() if is_stack(row)]


@dataclass(frozen=True)
class _Call:
    """A call of a block.

    Attributes:
        block: which one.
        hidden: its first argument, or None where that is no tensor.
        args, kwargs: its other arguments, but for caches.
        linked: whether ``hidden`` is what the block that was called before has returned.
    """

    block: int
    hidden: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    linked: bool


@contextmanager
def _calls(blocks: Sequence[nn.Module], on_call: Callable[[_Call], object]) -> Iterator[None]:
    """Pass every call of a block on."""
    returned: list[Any] = []

    def before(block: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop(_HIDDEN, None)
            for name in ("past_key_values", "past_key_value", "use_cache"):
                rest.pop(name, None)
            if not isinstance(hidden, Tensor):
                hidden = None
            linked = bool(returned) and hidden is not None and _equal(returned.pop(), hidden)
            on_call(_Call(block, hidden, args[1:], rest, linked))

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        returned[:] = [output[0] if isinstance(output, (tuple, list)) and output else output]

    handles = [block.register_forward_pre_hook(before(n), with_kwargs=True) for n, block in enumerate(blocks)]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _equal(left: Any, right: Tensor) -> bool:
    return left is right or (
        isinstance(left, Tensor) and left.device == right.device and torch.equal(left, right)
    )


def _in_float32(value: Any, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Return a value with its floating-point tensors in float32; equal tensors stay one."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dtype == torch.float32:
            return value
        return copies.setdefault(id(value), (value, value.float()))[1]
    if isinstance(value, tuple):
        return tuple(_in_float32(item, copies) for item in value)
    if isinstance(value, Mapping):
        return {key: _in_float32(item, copies) for key, item in value.items()}
    return value


def _unsupported(got: str) -> ConversionError:
    return ConversionError(
        got,
        "blocks that the model calls once each, one after the other, with hidden states as first argument",
        "use mode='independent'",
    )
