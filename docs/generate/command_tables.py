"""Tables of the options of each command, from the typer application itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import typer
from option_tables import cell, code

from dbf_compile.cli import app


def table(name: str) -> str:
    """Return what a command does, its arguments and options, and its examples.

    Args:
        name: of the command, such as "compress".
    """
    return "\n".join(_page(name))


def _page(name: str) -> Iterator[str]:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
    yield inspect.cleandoc(command.help or "")
    yield ""
    yield "```text"
    yield " ".join(["dbf-compile", name, *(one.name.upper() for one in arguments), "[OPTIONS]"])
    yield "```"
    yield ""
    yield '<div class="options" markdown>'
    yield ""
    yield "| argument or option | default | meaning |"
    yield "|---|---|---|"
    for one in arguments:
        yield f"| `{one.name.upper()}` | {_default(one)} | {_plain(one.help)} |"
    for one in options:
        names = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
        yield f"| {names} | {_default(one)} | {_plain(one.help)} |"
    yield ""
    yield "</div>"
    if command.epilog:
        examples = [line.strip() for line in command.epilog.splitlines() if "dbf-compile" in line]
        yield ""
        yield "```bash"
        yield from examples
        yield "```"


def _default(option: object) -> str:
    if option.required:  # type: ignore[attr-defined]
        return "needed"
    value = option.default  # type: ignore[attr-defined]
    if value is None or value is False or value == () or callable(value):
        return ""
    return "on" if value is True else code(str(value))


def _plain(help_: str | None) -> str:
    """Return a help text, which is not in Markdown, as a cell of a table."""
    return cell(re.sub(r"([*_<])", r"\\\1", help_ or ""))
