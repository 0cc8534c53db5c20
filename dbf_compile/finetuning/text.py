"""What is learned from: windows of fresh text, each used once; and some of every kind, to judge with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.kinds import OWN_TEXT
from dbf_compile.calibration.limits import checked, window_length
from dbf_compile.calibration.mixture import LEAST_TRAINED, in_turns, kept_back, kinds_of, split_count
from dbf_compile.errors import ConversionError, DBFError, OptionError
from dbf_compile.hashes import batches_hash
from dbf_compile.options import FinetuneConfig
from dbf_compile.progress import over, say
from dbf_compile.run.own_text import OwnText, share_of
from dbf_compile.run.work import Work

_LENGTH = 512  # tokens of a window
_NO_SHARE = 0.0  # of own text beside data: writing takes longer than learning


@dataclass(frozen=True)
class Text:
    """Windows of text: 4 bytes a token, so that a run knows its end, mixes kinds, and goes on anywhere.

    Args:
        learning: windows to learn from, int32 [windows, length], in the order in which they are used.
        judging: windows to judge with by kind, int32 [windows, length].
        own: what the dense model is to write, and is no part yet; or None.
    """

    learning: Tensor
    judging: dict[str, Tensor]
    own: OwnText | None = None

    @staticmethod
    def read(data: Any, tokenizer: Any, model: nn.Module, config: FinetuneConfig) -> Text:
        """Read data no further than needed, and plan what the dense model is to write.

        Args:
            data: as for ``token_batches``, or by kind of text; None for none.
            tokenizer: of the model, or None where there is none and no data.
            model: the dense model; its positions and its vocabulary are the limits.
            config: ``tokens``, ``length``, ``holdout``, ``seed``, ``column``, ``split``, and those of own text.

        Raises:
            ConversionError: the data cannot be read, or is too short.
            OptionError: neither data nor own text.
        """
        share = share_of(model, config.own_text, data, usual=_NO_SHARE)
        if data is None and not share:
            raise OptionError(
                "no data, and own_text=0",
                "text to learn from",
                "pass data=..., on the command line --data, or leave own_text out",
            )
        length = window_length(model, config.length, _LENGTH)
        counts = split_count(-(-config.tokens // length), {"data": 1 - share, OWN_TEXT: share})
        text = Text(torch.empty(0, length, dtype=torch.int32), {})
        if counts["data"]:
            text = _read(data, tokenizer, config, length, counts["data"])
            windows = (text.learning, *text.judging.values())
            checked(model, [{"input_ids": part.long()} for part in windows])
        if counts[OWN_TEXT]:
            kept = max(1, min(config.holdout, counts[OWN_TEXT] // 4))  # a fifth of all, as of data
            fresh = replace(config, seed=_other_seed(config.seed))
            own = OwnText.of(model, tokenizer, fresh, length, (counts[OWN_TEXT], kept))
            text = replace(text, own=own)
        return text._mixed(config.seed)

    def hash(self) -> str:
        """Return a hash of all of it, including what the model has yet to write."""
        read = batches_hash([self.learning, self.judging])
        return read if self.own is None else f"{read} {self.own.fingerprint()}"

    def written(self, model: nn.Module, work: Work, device: torch.device, config: FinetuneConfig) -> Text:
        """Return the text with the dense model's own in it.

        Args:
            model: the dense model on the device.
            work: where its text lies as it comes.
            device, config: where to compute, and the seed.
        """
        if self.own is None:
            return self
        own = replace(self.own, writer=replace(self.own.writer, model=model))
        windows = own.windows(work, device, config.progress)
        learning, judging = windows.split([own.calibrating, own.judging])
        judged = {**self.judging, OWN_TEXT: judging}
        return Text(torch.cat([self.learning, learning]), judged)._mixed(config.seed)

    def _mixed(self, seed: int) -> Text:
        order = torch.randperm(len(self.learning), generator=torch.Generator().manual_seed(seed))
        return replace(self, learning=self.learning[order])


def _other_seed(seed: int) -> int:
    """Return a seed for text that is fresh where ``compress`` has had the model write with the same one."""
    return int.from_bytes(hashlib.sha256(f"finetune {seed}".encode()).digest()[:7])


def _read(data: Any, tokenizer: Any, config: FinetuneConfig, length: int, count: int) -> Text:
    """Read so many windows to learn from, of all kinds in turns until each has come to its end, and those to judge with.

    The last ones of a kind judge: a model is calibrated with the first ones of a text, and knows them better than others.
    """
    enough = LEAST_TRAINED * config.holdout
    kinds = kinds_of(data, config.column, "text")
    streams = {
        kind: _windows(kind, source, tokenizer, config, length, enough + count)
        for kind, source in kinds.items()
    }
    learning: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    judging: dict[str, Tensor] = {}
    turns = islice(_in_turns(streams), count)
    for kind, window in over(turns, "reading text", "window", config.progress, count):
        learning[kind].append(window)
    for kind, windows in learning.items():
        learned = len(windows)
        windows += islice(streams[kind], max(config.holdout, enough - learned))
        if len(windows) == 1:
            raise ConversionError(
                f"{kind}: a text of one window of {length} tokens",
                "one to judge with, and more to learn from",
                "give more text, or a smaller length",
            )
        kept = max(1, kept_back(len(windows), config.holdout))
        judging[kind] = torch.stack(windows[-kept:])
        del windows[min(learned, len(windows) - kept) :]
    total = sum(map(len, learning.values()))
    if total < count:
        say(
            f"{total * length} tokens of text, fewer than the {count * length} that were asked for",
            config.progress,
        )
    return Text(torch.stack(list(chain.from_iterable(learning.values()))), judging)


def _windows(
    kind: str, source: Any, tokenizer: Any, config: FinetuneConfig, length: int, count: int
) -> Iterator[Tensor]:
    try:
        for batch in in_turns(source, tokenizer, config, length, count):
            yield batch["input_ids"][0].to(torch.int32)
    except DBFError as error:
        raise error.inside(kind) from error.__cause__


def _in_turns(streams: Mapping[str, Iterator[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    kinds = list(streams)
    while kinds:
        for kind in list(kinds):
            window = next(streams[kind], None)
            if window is None:
                kinds.remove(kind)
            else:
                yield kind, window
