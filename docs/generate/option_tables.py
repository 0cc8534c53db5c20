"""Tables of options, from the records of ``dbf_compile``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

import dbf_compile
from dbf_compile.doctor import EXTRAS
from dbf_compile.records import ALIASES, describe

_BASE = dbf_compile.CompressionConfig


def table(name: str) -> str:
    """Return a table of the fields of a record; those of the record that it extends are left out.

    Args:
        name: of a record of ``dbf_compile``, such as "CompressOptions".
    """
    return "\n".join(['<div class="options" markdown>', "", *_rows(getattr(dbf_compile, name)), "", "</div>"])


def aliases() -> str:
    """Return a list of other spellings of options."""
    return "\n".join(f"- `{short}` stands for `{name}`" for short, name in ALIASES.items())


def extras() -> str:
    """Return what each extra installs, and what that brings."""
    rows = (f"| `{extra}` | `{package}` | {use} |" for package, (extra, use) in EXTRAS.items())
    return "\n".join(["| extra | package | for |", "|---|---|---|", *rows])


def _rows(record: type) -> Iterator[str]:
    inherited = {field.name for field in describe(_BASE)} if issubclass(record, _BASE) else set()
    yield "| option | default | values | meaning |"
    yield "|---|---|---|---|"
    for field in describe(record):
        if record is _BASE or field.name not in inherited:
            values = ", ".join(code(repr(one)) for one in field.choices or ()) or _type(field.type)
            yield f"| `{field.name}` | {code(repr(field.default))} | {values} | {cell(field.help)} |"


def _type(annotation: str) -> str:
    return code(annotation.replace("torch.device", "device"))


def code(text: str) -> str:
    """Return a text as code in a cell of a table."""
    return f"<code>{escape(text, quote=False).replace('|', '&#124;')}</code>"


def cell(text: str) -> str:
    """Return a sentence as a cell of a table."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text).replace("] [", "]\u200b [")  # no links of Markdown
    return text[:1].upper() + text[1:]
