"""What flows into the blocks of a transformer, so that blocks can be run one at a time.

A model is run once up to its first block; from there on every block is called with the output of the one before and with
whatever else the model passed it (positions, masks), which is the same for every stream of hidden states.
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
    """Hidden states in front of the first block, and how every block is called.

    Args:
        hidden: of every batch, float32.
        calls: of every batch, for every block: positional and keyword arguments without the hidden states.
        masks: of every batch, which positions are no padding, as bool [batch, tokens]; None where it does not say.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return the output of block ``index`` for the hidden states of one batch."""
        args, kwargs = self.calls[batch][index]
        output = block(hidden, *args, **kwargs)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result

    @torch.no_grad()
    def outputs(self, block: nn.Module, index: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of block ``index`` for the hidden states of every batch."""
        return [self.run(block, index, batch, hidden) for batch, hidden in enumerate(inputs)]

    def counted(self, batch: int, values: Tensor) -> Tensor:
        """Return rows [T, features] of the positions of ``values`` [batch, tokens, features] that are no padding."""
        mask = self.masks[batch]
        if mask is not None and mask.shape == values.shape[:-1]:
            return values[mask.to(values.device)]
        return values.flatten(0, -2)


class _StopHereError(Exception):
    pass


@torch.no_grad()
def record(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Any]) -> Streams:
    """Run a model once over all batches, and return what its blocks are called with.

    Args:
        model: in evaluation mode.
        blocks: called one after the other, each with the output of the one before as its first argument.
        batches: as for ``calibrate``.

    Raises:
        ConversionError: the blocks are called in another order or way.
    """
    streams = Streams()
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # masks and positions that blocks share go on being shared

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or value.dtype == torch.float32:
                return value
            return copies.setdefault(id(value), (value, value.float()))[1]
        if isinstance(value, tuple):
            return tuple(map(widened, value))
        if isinstance(value, Mapping):
            return {key: widened(item) for key, item in value.items()}
        return value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop(_HIDDEN, None)
        if not isinstance(hidden, Tensor):
            raise _other_way("a block that is called without hidden states in front")
        for name in ("past_key_values", "past_key_value", "use_cache"):
            rest.pop(name, None)
        seen.append((hidden.float(), widened(args[1:]), widened(rest)))
        if len(seen) == len(blocks):
            raise _StopHereError

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        with without_kv_cache(model):
            for batch in batches:
                seen.clear()
                copies.clear()
                with suppress(_StopHereError):
                    call_model(model, batch)
                if len(seen) != len(blocks):
                    raise _other_way(f"{len(seen)} calls of {len(blocks)} blocks")
                streams.hidden.append(seen[0][0])
                streams.calls.append([(args, kwargs) for _, args, kwargs in seen])
                streams.masks.append(attention_mask(batch))
    finally:
        for handle in handles:
            handle.remove()
    return streams


def _other_way(got: str) -> ConversionError:
    return ConversionError(
        got,
        "blocks that a model calls once each, one after the other, with hidden states first",
        "use mode='independent'",
    )
