"""What a run calibrates, trains and judges with: text by kind, ready batches, and text that the model writes itself."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dbf_compile.calibration.kinds import OTHER, OWN_TEXT
from dbf_compile.calibration.limits import checked, window_length
from dbf_compile.calibration.mixture import Part, interleaved, read_parts, split_count
from dbf_compile.calibration.model_io import check_reads_tokens, reads_tokens, to_device, token_ids
from dbf_compile.errors import OptionError
from dbf_compile.hashes import batches_hash
from dbf_compile.options import CompressOptions
from dbf_compile.run.own_text import OwnText, share_of
from dbf_compile.run.report import BATCHES, RANDOM_TOKENS, DataFacts, DataPart
from dbf_compile.run.work import Work

_LENGTH = 512  # tokens of a window, as usual in calibration
_WINDOWS, _MOST_TOKENS = 64, 2**18


@dataclass(frozen=True)
class CalibrationData:
    """Batches by kind of text.

    Args:
        parts: what was read; none where there are neither data nor batches.
        own_text: what the model is to write, and is no part yet; or None.
        device: of the batches.
        hash: of all of it, including what the model has yet to write.
    """

    parts: Sequence[Part]
    own_text: OwnText | None
    device: torch.device
    hash: str

    @staticmethod
    def of(
        model: nn.Module,
        config: CompressOptions,
        data: Any,
        batches: Sequence[Any] | None,
        tokenizer: Any,
        device: torch.device,
    ) -> tuple[CalibrationData, CompressOptions]:
        """Read data, and plan what the model is to write.

        Args:
            model: the dense model.
            config: length, windows and mixture.
            data, batches: as of ``compress``.
            tokenizer: a tokenizer, or None where there is none and no data.
            device: where to compute.

        Returns:
            The data, and the options with length, windows and mode as they are.

        Raises:
            OptionError: options that go with other data.
            ConversionError: the data cannot be read, or the model cannot write.
        """
        parts: list[Part] = []
        own_text = None
        share = share_of(model, config.own_text, data, batches)
        if batches is not None:
            parts = [Part.of(BATCHES, BATCHES, _checked(model, batches), config.holdout)]
        elif data is not None or share:
            length = window_length(model, config.length, _LENGTH)
            windows = config.windows or max(1, min(_WINDOWS, _MOST_TOKENS // length))
            config = replace(config, length=length, windows=windows)
            shares = {"data": 1 - share, OWN_TEXT: share}
            trained, judged = split_count(windows, shares), split_count(config.holdout, shares)
            if data is not None:
                check_reads_tokens(model)
                options = replace(config, holdout=judged["data"])
                parts = read_parts(model, data, tokenizer, options, trained["data"], _LENGTH)
            if trained[OWN_TEXT]:
                kept_back = min(judged[OWN_TEXT], trained[OWN_TEXT] // 4)  # as many as Part.of keeps back
                own_text = OwnText.of(model, tokenizer, config, length, (trained[OWN_TEXT], kept_back))
        if data is None and batches is None and not share and config.own_text is None:
            _say_random(model)
        config = replace(config, mode=_mode(config, bool(parts or own_text)))
        moved = [_moved(part, device) for part in parts]
        return CalibrationData(moved, own_text, device, _hash(parts, own_text)), config

    @cached_property
    def calibrating(self) -> list[Any]:
        """The batches to calibrate and train with, those of all kinds in turns."""
        return interleaved([part.calibrating for part in self.parts])

    @cached_property
    def judging(self) -> dict[str, Sequence[Any]]:
        """The batches to judge with, by kind of text; kinds without any are left out."""
        return {part.kind: part.judging for part in self.parts if part.judging}

    def written(self, work: Work, progress: bool) -> CalibrationData:
        """Return the data with the model's own text among its parts."""
        if self.own_text is None:
            return self
        own = _moved(self.own_text.part(work, self.device, progress), self.device)
        return replace(self, parts=[*self.parts, own], own_text=None)

    def facts(self) -> DataFacts:
        """Return what a report says of it."""
        kinds = {
            part.kind: DataPart(part.source, len(part.calibrating), _tokens(part.calibrating))
            for part in self.parts
        }
        is_told_apart = list(kinds) not in ([], [OTHER], [BATCHES])
        return DataFacts(
            source=", ".join(part.source for part in self.parts) or RANDOM_TOKENS,
            hash=self.hash,
            windows=len(self.calibrating),
            tokens=_tokens(self.calibrating),
            kinds=kinds if is_told_apart else None,
        )


def _checked(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    ready = list(checked(model, batches))
    if not ready:
        raise OptionError(
            "batches without a batch", "one or more", "look at where they come from, or leave batches out"
        )
    return ready


def _hash(parts: Sequence[Part], own_text: OwnText | None) -> str:
    read = batches_hash(batch for part in parts for batch in (*part.calibrating, *part.judging))
    if own_text is None:
        return read
    split = [(part.kind, len(part.calibrating)) for part in parts]
    return hashlib.sha256(f"{read} {split} {own_text.fingerprint()}".encode()).hexdigest()


def _say_random(model: nn.Module) -> None:
    """Warn where a model reads text, but has none."""
    if reads_tokens(model):
        warnings.warn(
            f"{type(model).__name__} writes no text of its own, and is calibrated with random tokens, which is worse: "
            "pass data='text.txt', or batches of what it reads",
            stacklevel=6,
        )


def _mode(config: CompressOptions, has_batches: bool) -> str:
    if config.mode == "sequential" and not has_batches:
        raise OptionError(
            "mode='sequential' without data",
            "data or batches, or a model that writes text itself",
            "pass data='text.txt', or mode='independent'",
        )
    return config.mode if config.mode != "auto" else "sequential" if has_batches else "independent"


def _moved(part: Part, device: torch.device) -> Part:
    calibrating, judging = (
        [to_device(batch, device) for batch in batches] for batches in (part.calibrating, part.judging)
    )
    return replace(part, calibrating=calibrating, judging=judging)


def _tokens(batches: Sequence[Any]) -> int:
    ids = (token_ids(batch) for batch in batches)
    return sum(one.numel() for one in ids if one is not None)
