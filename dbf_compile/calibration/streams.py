"""Recorded inputs of a transformer's blocks, to run blocks one at a time.

The model runs once, up to its last block. Afterwards each block can be called with the hidden states of any stream (dense
or compressed prefix) and with the other arguments that the model passed it, such as positions and masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import attention_mask, call_model
from dbf_compile.calibration.offload import without_kv_cache
from dbf_compile.errors import ConversionError

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Streams:
    """Hidden states before the first block, and the other arguments of every block.

    Args:
        hidden: hidden states of every batch, float32 [batch, tokens, features].
        calls: positional and keyword arguments besides the hidden states, as ``calls[batch][block]``.
        masks: of every batch, which positions are no padding, as bool [batch, tokens]; None without an
            ``attention_mask``.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return the hidden states that block ``index`` makes of ``hidden``, with the arguments of batch ``batch``."""
        args, kwargs = self.calls[batch][index]
        output = block(hidden, *args, **kwargs)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result

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

    def in_float32(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or value.dtype == torch.float32:
                return value
            return copies.setdefault(id(value), (value, value.float()))[1]
        if isinstance(value, tuple):
            return tuple(map(in_float32, value))
        if isinstance(value, Mapping):
            return {key: in_float32(item) for key, item in value.items()}
        return value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop(_HIDDEN, None)
        if not isinstance(hidden, Tensor):
            raise _unsupported("a block that is called without hidden states as its first argument")
        for name in ("past_key_values", "past_key_value", "use_cache"):
            rest.pop(name, None)
        seen.append((hidden.float(), in_float32(args[1:]), in_float32(rest)))
        if len(seen) == len(blocks):
            raise _LastBlockError

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        with without_kv_cache(model):
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
    finally:
        for handle in handles:
            handle.remove()
    return streams


def _unsupported(got: str) -> ConversionError:
    return ConversionError(
        got,
        "blocks that the model calls once each, one after the other, with hidden states as first argument",
        "use mode='independent'",
    )
