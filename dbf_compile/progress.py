"""Progress of all that takes time: bars and lines on stderr, so that results on stdout stay readable by programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_SECONDS_IN_A_LOG = 10.0  # between two states of a bar where stderr is a file: each is a line there


def bar(description: str, total: int | None, unit: str, shown: bool, delay: float = 0.0) -> tqdm[Any]:
    """Return a bar, which appears at once; inside another one it disappears at its end.

    Args:
        description: what goes on, as a verb: "calibrating".
        total: the units of the whole, or None where that is not known.
        unit: of ``update``.
        shown: False for a bar that shows nothing.
        delay: seconds of a whole that is usually short, before which the bar does not appear.
    """
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=total is not None and total >= 1000,
        desc=description,
        disable=not shown,
        leave=None,
        delay=delay,
        mininterval=0.1 if sys.stderr.isatty() else _SECONDS_IN_A_LOG,
    )


def over(
    items: Iterable[T],
    description: str,
    unit: str,
    shown: bool,
    total: int | None = None,
    delay: float = 0.0,
) -> Iterator[T]:
    """Yield items, and move a bar for each; it appears before the first item is asked for.

    Args:
        items: their number is the total, where they have one.
        description, unit, shown, delay: as for :func:`bar`.
        total: the number of items, where they do not know it.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total, unit, shown, delay) as moving:
        for item in items:
            yield item
            moving.update(1)


def say(message: str, shown: bool) -> None:
    """Write one line on stderr, above the bars, at the beginning of what has no parts to count."""
    if shown:
        tqdm.write(message, file=sys.stderr)
