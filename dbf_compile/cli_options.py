"""What commands share: options made of records (a parameter that is annotated with a record becomes one option a field)."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from dbf_compile.errors import OptionError
from dbf_compile.records import OptionHelp, Record, describe

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Folder = Annotated[str, typer.Argument(help="Folder of a model, a GGUF file, or its name on the Hub.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
Progress = Annotated[bool, typer.Option(help="Say on stderr what goes on.")]

_SHORT_NAMES = {"bits_per_weight": "--bits", "do_sample": "--sample/--no-sample"}
_TYPES: dict[str, Any] = {
    "float": float,
    "float | None": float | None,
    "int": int,
    "int | None": int | None,
    "bool": bool,
    "bool | None": bool | None,
    "str": str,
    "str | float": str,
    "str | None": str | None,
    "tuple[str, ...]": list[str] | None,
    "Mapping[str, float]": str | None,
    "torch.device | str | None": str | None,
}


def expand_records(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command in whose signature every parameter of a record type is replaced by options for its fields.

    The record is made of the values when the command is called, and checks them.
    """
    hints = get_type_hints(function, include_extras=True)
    records: dict[str, type[Record]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints[parameter.name]
        if isinstance(annotation, type) and issubclass(annotation, Record):
            records[parameter.name] = annotation
            parameters += [_option(item) for item in describe(annotation)]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=annotation))

    @wraps(function)
    def command(**values: Any) -> Any:
        for name, kind in records.items():
            options = {item.name: _value(item, values.pop(item.name)) for item in describe(kind)}
            # An empty list stands for an option that was not given.
            values[name] = kind(**{key: value for key, value in options.items() if value is not None})
        return function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Return options from ``name=value`` texts; the value is JSON, or else a string.

    Raises:
        OptionError: a text without "=".
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise OptionError(f"--set {setting}", "name=value", "for instance --set distill=0")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def compared(model: str, dense: str | None) -> list[str]:
    """Return the names of the models of a command, which stand for them in its results."""
    if dense == model:
        raise typer.BadParameter(f"{dense} is the model itself", param_hint="--dense")
    return [model, *([dense] if dense else [])]


def as_json_text(facts: Any) -> str:
    """Return facts as JSON, which has no word for numbers that are not finite: they are null."""
    return json.dumps(_finite(facts), default=str, allow_nan=False)


def _finite(facts: Any) -> Any:
    if isinstance(facts, float) and not math.isfinite(facts):
        return None
    if isinstance(facts, Mapping):
        return {key: _finite(value) for key, value in facts.items()}
    return [_finite(value) for value in facts] if isinstance(facts, (list, tuple)) else facts


@contextmanager
def results_alone(as_json: bool) -> Iterator[None]:
    """Send what other libraries print to stderr where stdout is for programs."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def _option(item: OptionHelp) -> inspect.Parameter:
    flag = "--" + item.name.replace("_", "-")
    flags = [_SHORT_NAMES[item.name]] if item.name in _SHORT_NAMES else []
    flags.append(f"{flag}/--no-{flag[2:]}" if item.type.startswith("bool") else flag)
    text, default = item.help.replace("``", ""), item.default
    if item.type == "tuple[str, ...]":
        text += " May be repeated." + (f" [default: {' '.join(default)}]" if default else "")
        default = None
    if item.type == "Mapping[str, float]":
        name = "*.down_proj" if item.name == "overrides" else "code"
        text += f" As JSON, such as '{{\"{name}\": 3}}'."
        default = None
    option = typer.Option(*flags, help=text, metavar="|".join(item.choices) if item.choices else None)
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[_TYPES[item.type], option],
    )


def _value(item: OptionHelp, value: Any) -> Any:
    if item.type == "tuple[str, ...]":
        return tuple(value) if value else None
    if item.type == "Mapping[str, float]" and value is not None:
        return parse_settings([f"{item.name}={value}"])[item.name]
    return value
