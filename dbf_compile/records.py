"""Records of options: frozen dataclasses that check types, choices and ranges of their fields however they are made.

A field is declared by :func:`option` where it has constraints. The help text of a field stands in the docstring of its class,
under ``Args``; :func:`describe` gives it to the command line and to the documents.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dbf_compile.errors import OptionError

# Other spellings of a field, accepted wherever options are keywords.
ALIASES = {"bits": "bits_per_weight", "form": "curvature"}


def option(
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    changes_results: bool = True,
) -> Any:
    """Return a dataclass field with its constraints: allowed strings, a range, whether results depend on it."""
    metadata = {"choices": choices, "low": low, "high": high, "changes_results": changes_results}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records: checks types, choices and ranges of the fields when it is made."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", "")
            # Fields of other types, which a user's own record may add, are not checked.
            allowed, check = _TYPES.get(kind, ("", lambda value: True))
            if not check(value):
                raise OptionError(f"option {item.name}={value!r}", allowed, f"pass {item.name} as {allowed}")
            if kind == "str | None" and value is not None:
                object.__setattr__(self, item.name, str(value))
            if kind == "tuple[str, ...]":
                object.__setattr__(self, item.name, tuple(value))
            if isinstance(value, (int, float, str)):
                _check_constraints(item, value)


_R = TypeVar("_R", bound=Record)


def accept_aliases(kind: type[_R]) -> type[_R]:
    """Let the constructor of a record take the other spellings of its fields, too."""
    generated = kind.__init__

    @wraps(generated)
    def init(self: _R, **values: Any) -> None:
        generated(self, **_spelled(values, {item.name for item in fields(kind)}))

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def _spelled(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return values by the names of fields; other spellings are replaced.

    Raises:
        OptionError: a field in two spellings.
    """
    spelled: dict[str, Any] = {}
    for key, value in values.items():
        alias = ALIASES.get(key)
        name = key if alias is None or key in names or alias not in names else alias
        if name in spelled:
            raise OptionError(f"{name!r} in two spellings", "one of them", f"pass {name!r} alone")
        spelled[name] = value
    return spelled


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_mapping(value: Any, check: Callable[[Any], bool] = lambda value: True) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and check(v) for k, v in value.items())


# By the annotation of a field: what is allowed, in words, and the check.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", _is_number),
    "float | None": ("a number or None", lambda value: value is None or _is_number(value)),
    "int": ("a whole number", _is_whole),
    "int | None": ("a whole number or None", lambda value: value is None or _is_whole(value)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "bool | None": ("True, False or None", lambda value: value is None or isinstance(value, bool)),
    "str": ("a string", lambda value: isinstance(value, str)),
    "str | float": ("a string or a number", lambda value: isinstance(value, str) or _is_number(value)),
    "str | None": ("a string, a path or None", lambda value: value is None or isinstance(value, (str, Path))),
    "tuple[str, ...]": (
        "a list of strings",
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value),
    ),
    "Mapping[str, float]": (
        "a dictionary from name pattern to number",
        lambda value: _is_mapping(value, _is_number),
    ),
    "Mapping[str, Any]": ("a dictionary with string keys", _is_mapping),
    "torch.device | str | None": (
        "a device or its name, or None",
        lambda value: value is None or isinstance(value, (str, torch.device)),
    ),
    "Callable[..., Any] | str | None": (
        "the name of a loss, a function or None",
        lambda value: value is None or isinstance(value, str) or callable(value),
    ),
}


def _check_constraints(item: Field[Any], value: float | str) -> None:
    limits = item.metadata
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices is not None and value not in choices:
        raise OptionError(
            f"{item.name}={value!r}",
            ", ".join(map(repr, choices)),
            f"leave {item.name} out for {item.default!r}",
        )
    if isinstance(value, str) or (low is None and high is None):
        return
    if not (low is None or value >= low) or not (high is None or value <= high):
        allowed = f"{low} or more" if high is None or high > 2**62 else f"{low} to {high}"
        raise OptionError(f"{item.name}={value}", allowed, f"leave {item.name} out for {item.default!r}")


def parse(kind: type[_R], settings: Mapping[str, Any]) -> _R:
    """Build a record from a dictionary.

    Args:
        kind: the class of the record.
        settings: field name, or one of ``ALIASES``, to value.

    Raises:
        OptionError: an unknown key (the known ones are listed), a field given twice, a value of the wrong type or range.
    """
    names = {item.name for item in fields(kind)}
    values = _spelled(settings, names)
    for key in values:
        if key not in names:
            others = [alias for alias, name in ALIASES.items() if name in names]
            close = difflib.get_close_matches(str(key), [*names, *others], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise OptionError(f"unknown option {key!r}", ", ".join(sorted(names)), hint)
    return kind(**values)


def resolve(kind: type[_R], config: Record | None, keywords: Mapping[str, Any]) -> _R:
    """Return the record of a call that takes ``config`` and its fields as keywords; keywords win.

    Args:
        kind: the class of the record.
        config: a record; of one of another kind, the fields count that both have from the same base.
        keywords: as for :func:`parse`.

    Raises:
        OptionError: as for :func:`parse`, or ``config`` is no record.
    """
    if config is None:
        return parse(kind, keywords)
    if not isinstance(config, Record):
        raise OptionError(
            f"config of type {type(config).__name__}", kind.__name__, f"pass config={kind.__name__}(...)"
        )
    names = {item.name for item in fields(kind)}
    common = next(cls for cls in type(config).__mro__ if issubclass(kind, cls))
    shared = fields(common)
    if not shared:
        raise OptionError(
            f"config of type {type(config).__name__}", kind.__name__, f"pass config={kind.__name__}(...)"
        )
    base = {item.name: getattr(config, item.name) for item in shared}
    return parse(kind, {**base, **_spelled(keywords, names)})


class OptionHelp(NamedTuple):
    """One option as documents and the command line show it."""

    name: str
    type: str
    default: Any
    choices: tuple[str, ...] | None
    help: str


def describe(kind: type[Record]) -> list[OptionHelp]:
    """Return name, type, default, choices and help text of every field of a record, from its class and docstring."""
    helps: dict[str, str] = {}
    for cls in kind.__mro__:
        body = (cls.__doc__ or "").partition("Args:\n")[2]
        for match in re.finditer(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", body, re.MULTILINE):
            helps.setdefault(match[1], re.sub(r"\s+", " ", match[2]))
    described = []
    for item in fields(kind):
        factory = item.default_factory
        default = factory() if callable(factory) else item.default
        described.append(
            OptionHelp(
                item.name, str(item.type), default, item.metadata.get("choices"), helps.get(item.name, "")
            )
        )
    return described
