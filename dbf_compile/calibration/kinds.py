"""Kinds of text: what a compressed model is judged on, and what it may be calibrated with, one kind at a time.

A model that was calibrated with one kind of text may have lost others. So sources can be told apart by kind: on the command
line as ``--data code=src.py --data web=pages.jsonl``, in Python as ``{"code": "src.py", "web": rows}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Five kinds that differ in words, in form and in what follows from what. A name of one's own serves as well.
KINDS = ("encyclopedia", "web", "stories", "code", "dialogues")
OWN_TEXT = "own text"  # of the model, which writes many kinds
OTHER = "other"  # sources whose kind was not said, beside others whose was
_KIND_AND_SOURCE = re.compile(r"([^\W\d_][\w-]*)=(.+)", re.DOTALL)


def parse_sources(values: Sequence[str]) -> dict[str, list[str]]:
    """Return sources of a command line by kind, in the order in which kinds come first.

    Args:
        values: each ``kind=source``, or a source alone: its kind is ``OTHER``. What exists as a path is one, "=" or not.
    """
    sources: dict[str, list[str]] = {}
    for value in values:
        match = None if _exists(value) else _KIND_AND_SOURCE.fullmatch(value)
        kind, source = match.groups() if match else (OTHER, value)
        sources.setdefault(kind, []).append(source)
    return sources


def by_kind(source: Any, column: str | None = None) -> dict[str, Any] | None:
    """Return sources by kind, or None for a source whose kinds were not said.

    Args:
        source: data as for :func:`~dbf_compile.calibration.batches.token_batches`, or a mapping from kind to such data. A mapping
            is one of kinds if its keys are in ``KINDS``, or ``OTHER``, or if one of its values is a path (``Path``, or a list of
            them), which no table holds; any other is a table, or splits of one.
        column: a key of that name makes the mapping a table.
    """
    if not isinstance(source, Mapping) or not source or column in source:
        return None
    if all(kind in (*KINDS, OTHER) for kind in source) or any(map(_is_path, source.values())):
        return {str(kind): part for kind, part in source.items()}
    return None


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a text, longer than any path; a user without a home
        return False


def _is_path(part: Any) -> bool:
    parts = part if isinstance(part, (list, tuple)) else [part]
    return bool(parts) and all(isinstance(one, Path) for one in parts)
