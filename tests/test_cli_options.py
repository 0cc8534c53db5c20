"""Options of commands made of records: every field is one, help comes along, values are checked by the record."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dbf_compile.cli_options import as_json_text, compared, expand_records, parse_settings
from dbf_compile.errors import OptionError
from dbf_compile.options import CalibrationConfig, CompressOptions, EvaluationConfig
from dbf_compile.records import Record, describe, option


def command_for(kind: type[Record]) -> tuple[typer.Typer, list[Any]]:
    """Return a program whose only command takes the fields of a record, and the records that it was called with."""
    app, records = typer.Typer(), []

    def run(options: Any, count: int = 1) -> None:
        """Run."""
        records.append((options, count))

    run.__annotations__["options"] = kind
    app.command()(expand_records(run))
    return app, records


@pytest.mark.parametrize("kind", [CompressOptions, EvaluationConfig])
def test_without_options_the_record_has_its_defaults(kind: type[Record]) -> None:
    app, records = command_for(kind)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0, done.output
    assert records == [(kind(), 1)]


@pytest.mark.parametrize("kind", [CompressOptions, EvaluationConfig])
def test_every_field_is_an_option_with_its_help(kind: type[Record]) -> None:
    app, _ = command_for(kind)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
    words = " ".join(text.split())
    for item in describe(kind):
        assert "--" + item.name.replace("_", "-") in words
        assert item.help.replace("``", "").split()[0] in words


def test_values_arrive_as_the_types_of_the_fields() -> None:
    app, records = command_for(CompressOptions)
    arguments = "--bits 1.5 --mode block --no-progress --tune 0 --temper 0.5 --skip *a --skip *b --count 3"
    done = CliRunner().invoke(
        app, [*arguments.split(), "--overrides", '{"*.down_proj": 3}', "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    ((record, count),) = records
    expected = CompressOptions(
        bits_per_weight=1.5,
        mode="sequential",
        progress=False,
        tune=0,
        temper=0.5,
        skip=("*a", "*b"),
        overrides={"*.down_proj": 3},
        device="cpu",
    )
    assert record == expected and count == 3


@pytest.mark.parametrize(
    "arguments",
    [["--bits", "99"], ["--mode", "fast"], ["--tune", "-1"], ["--overrides", "3"], ["--preset", "slow"]],
)
def test_the_record_refuses_wrong_values(arguments: list[str]) -> None:
    app, records = command_for(CompressOptions)
    assert isinstance(CliRunner().invoke(app, arguments).exception, OptionError) and not records


def test_a_field_of_a_type_without_an_option_is_found_when_the_command_is_made() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Record):
        importance: dict[int, int] = option({})

    assert {field.name for field in fields(Odd)} == {"importance"}
    for kind in (Odd, CalibrationConfig):  # a loss may be a function
        with pytest.raises(KeyError):
            command_for(kind)


def test_settings_are_json_or_text() -> None:
    settings = parse_settings(["a=1", 'b=["x"]', "c=fast", "d=null", "e=x=y"])
    assert settings == {"a": 1, "b": ["x"], "c": "fast", "d": None, "e": "x=y"}
    with pytest.raises(OptionError, match="name=value"):
        parse_settings(["distill"])


def test_json_is_json_whatever_the_numbers_are() -> None:
    facts = {"a": float("nan"), "b": [1, (float("inf"), 0.5)], "c": {"d": Path("x")}, "e": True, "f": None}
    text = as_json_text(facts)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [1, [None, 0.5]], "c": {"d": "x"}, "e": True, "f": None
    }  # fmt: skip


def test_a_model_is_not_compared_with_itself() -> None:
    assert compared("a", None) == ["a"] and compared("a", "b") == ["a", "b"]
    with pytest.raises(typer.BadParameter, match="the model itself"):
        compared("a", "a")
