"""Mixtures: windows of several kinds of text in stated shares, some of each kept back to judge with.

A source that is a list of paths gives a window of each path in turn. Files that are too short for a window are joined.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from dbf_compile.calibration.batches import alternating_batches, token_batches
from dbf_compile.calibration.kinds import OTHER, OWN_TEXT, by_kind
from dbf_compile.calibration.limits import checked, window_length
from dbf_compile.calibration.sources import are_paths, name_of
from dbf_compile.errors import DBFError, OptionError
from dbf_compile.options import CompressOptions, FinetuneConfig
from dbf_compile.progress import over

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
LEAST_TRAINED = 5  # windows for one that is kept back: where data is short, calibration needs it more


@dataclass(frozen=True)
class Part:
    """What a mixture has of one kind of text.

    Args:
        kind: its name.
        source: where it comes from, for the report.
        calibrating: batches to calibrate and train with.
        judging: batches to judge with.
    """

    kind: str
    source: str
    calibrating: Sequence[Any]
    judging: Sequence[Any]

    @staticmethod
    def of(kind: str, source: str, batches: Sequence[Any], judged: int) -> Part:
        """Return a part whose last batches are kept back: ``judged`` of them, but no more than a fifth."""
        split = len(batches) - kept_back(len(batches), judged)
        return Part(kind, source, batches[:split], batches[split:])


def kept_back(windows: int, asked: int) -> int:
    """Return how many windows of a kind are kept back to judge with: as many as are asked for, but no more than a fifth."""
    return min(asked, windows // LEAST_TRAINED)


def kinds_of(data: Any, column: str | None, alone: str = OTHER) -> dict[str, Any]:
    """Return data to learn from by kind of text, as :func:`~dbf_compile.calibration.kinds.by_kind`; what has no kinds is ``alone``.

    Raises:
        OptionError: a kind has the name of the model's own text.
    """
    kinds = by_kind(data, column)
    if kinds is not None and OWN_TEXT in kinds:
        raise OptionError(
            f"data of the kind {OWN_TEXT!r}",
            "any other name",
            "that is what the model writes itself: see own_text",
        )
    return {alone: data} if kinds is None else kinds


def read_parts(
    model: nn.Module, data: Any, tokenizer: Any, options: CompressOptions, windows: int, usual: int
) -> list[Part]:
    """Return the windows of data, by kind, each a batch; those after ``windows`` are kept back, a quarter of these at most.

    Args:
        model: its positions and its vocabulary are the limits.
        data: as for :func:`~dbf_compile.calibration.batches.token_batches`, or a mapping from kind to such data
            (:func:`~dbf_compile.calibration.kinds.by_kind`).
        tokenizer: as for :func:`~dbf_compile.calibration.batches.token_batches`.
        options: length, column, split, progress, and ``shares`` and ``holdout`` of the mixture.
        windows: of all kinds together.
        usual: tokens of a window where ``options.length`` is None.

    Raises:
        OptionError, ConversionError: as for :func:`~dbf_compile.calibration.batches.token_batches`, or a share of a kind that
            there is not.
    """
    kinds = kinds_of(data, options.column)
    shares = _shares(options.shares, kinds)
    calibrated, judged = split_count(windows, shares), split_count(options.holdout, shares)
    parts = []
    for kind, source in kinds.items():
        kept = min(judged[kind], calibrated[kind] // (LEAST_TRAINED - 1))  # all that Part.of keeps back
        asked = calibrated[kind] + kept
        if not calibrated[kind]:
            _log.warning("no window of %s: its share of %s windows is less than one", kind, windows)
            continue
        try:
            read = _windows(model, source, tokenizer, options, asked, usual)
        except DBFError as error:
            raise (error.inside(kind) if len(kinds) > 1 else error) from error.__cause__
        if len(read) < asked:
            _log.warning("%s has %s windows of the %s that its share asks for", kind, len(read), asked)
        parts.append(Part.of(kind, name_of(source), read, kept))
    return parts


def _shares(asked: Mapping[str, float], kinds: Collection[str]) -> dict[str, float]:
    """Return the share of every kind, which may have any sum."""
    strangers = [kind for kind in asked if kind not in kinds]
    shares = {kind: float(asked.get(kind, 1.0)) for kind in kinds}
    if strangers or not all(0 <= share < math.inf for share in shares.values()) or not any(shares.values()):
        raise OptionError(
            f"shares={dict(asked)} of data of the kinds {', '.join(kinds)}",
            "a number of 0 or more for any of these kinds, and not 0 for all",
            "name a kind as --data kind=path does, or leave shares out for equal ones",
        )
    return shares


def _windows(
    model: nn.Module, source: Any, tokenizer: Any, options: CompressOptions, count: int, usual: int
) -> list[dict[str, Any]]:
    """Return at most ``count`` windows of one kind."""
    batches = in_turns(source, tokenizer, options, window_length(model, options.length, usual), count)
    return list(checked(model, list(over(batches, "reading data", "window", options.progress, count))))


def in_turns(
    source: Any, tokenizer: Any, options: CompressOptions | FinetuneConfig, length: int, count: int
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of one window of a source, of several paths a window of each in turn.

    Args:
        source, tokenizer: as for :func:`~dbf_compile.calibration.batches.token_batches`.
        options: column and split.
        length: tokens of a window.
        count: windows, at most.
    """
    read = alternating_batches if are_paths(source) and len(source) > 1 else token_batches
    return read(source, tokenizer, length=length, count=count, column=options.column, split=options.split)


def split_count(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return a whole number for every share, which together are ``total``: what is left goes to the largest remainders."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: int(amount) for name, amount in exact.items()}
    largest = sorted(exact, key=lambda name: counts[name] - exact[name])  # in turns where they are equal
    for name in largest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def interleaved(rows: Sequence[Sequence[_T]]) -> list[_T]:
    """Return the items of all rows, each row spread evenly over the whole, and in its order."""
    places = [
        ((place + 0.5) / len(row), number, place)
        for number, row in enumerate(rows)
        for place in range(len(row))
    ]
    return [rows[number][place] for _, number, place in sorted(places)]
