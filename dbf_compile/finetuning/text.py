"""What is learned from: windows of fresh text, each used once; and the first ones of every kind, to judge with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.batches import token_batches
from dbf_compile.calibration.kinds import by_kind
from dbf_compile.calibration.limits import checked, window_length
from dbf_compile.errors import ConversionError, DBFError
from dbf_compile.options import FinetuneConfig
from dbf_compile.progress import over, say

_LENGTH = 512  # tokens of a window


@dataclass(frozen=True)
class Text:
    """Windows of text: 4 bytes a token, so that a run knows its end, mixes kinds, and goes on anywhere.

    Args:
        learning: windows to learn from, int32 [windows, length], in the order in which they are used.
        judging: windows to judge with by kind, int32 [windows, length].
    """

    learning: Tensor
    judging: dict[str, Tensor]

    @staticmethod
    def read(data: Any, tokenizer: Any, model: nn.Module, config: FinetuneConfig) -> Text:
        """Read data no further than needed; kinds of text take turns until each has come to its end.

        Args:
            data: as for ``token_batches``, or by kind of text.
            tokenizer: of the model.
            model: its positions and its vocabulary are the limits.
            config: ``tokens``, ``length``, ``holdout``, ``seed``, ``column`` and ``split``.

        Raises:
            ConversionError: the data cannot be read, or is too short.
        """
        length = window_length(model, config.length, _LENGTH)
        count = -(-config.tokens // length)
        kinds = by_kind(data, config.column) or {"text": data}
        streams = {kind: _windows(kind, source, tokenizer, config, length) for kind, source in kinds.items()}
        judging = {
            kind: torch.stack(list(islice(stream, config.holdout))) for kind, stream in streams.items()
        }
        turns = over(
            islice(_in_turns(list(streams.values())), count), "reading text", "window", config.progress, count
        )
        learning = list(turns)
        if not learning:
            raise ConversionError(
                f"text of no more than {config.holdout} windows of {length} tokens",
                f"{config.holdout} to judge with, and more to learn from",
                "give more text, or a smaller holdout or length",
            )
        if len(learning) < count:
            say(
                f"{len(learning) * length} tokens of text, fewer than the {config.tokens} that were asked for",
                config.progress,
            )
        mixed = torch.randperm(len(learning), generator=torch.Generator().manual_seed(config.seed))
        text = Text(torch.stack(learning)[mixed], judging)
        checked(model, [{"input_ids": windows.long()} for windows in (text.learning, *judging.values())])
        return text


def _windows(kind: str, source: Any, tokenizer: Any, config: FinetuneConfig, length: int) -> Iterator[Tensor]:
    most = config.holdout + -(-config.tokens // length)
    try:
        batches = token_batches(
            source, tokenizer, length=length, count=most, column=config.column, split=config.split
        )
        for batch in batches:
            yield batch["input_ids"][0].to(torch.int32)
    except DBFError as error:
        raise error.inside(kind) from error.__cause__


def _in_turns(streams: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    while streams:
        for stream in list(streams):
            window = next(stream, None)
            if window is None:
                streams.remove(stream)
            else:
                yield window
