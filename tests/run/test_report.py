"""The report as records: what is read from JSON, what is refused, and that it survives a round trip."""

from __future__ import annotations

import copy
import json
import pickle  # noqa: TID251  what processes send each other
from pathlib import Path
from typing import Any

import pytest
from support.reports import report

from dbf_compile.errors import CheckpointError
from dbf_compile.run.compress import Compressed
from dbf_compile.run.page import report_html
from dbf_compile.run.report import REPORT, Report, read_report


def test_a_report_survives_json() -> None:
    parsed = Report.parse(report())
    assert Report.parse(json.loads(json.dumps(parsed))) == parsed
    assert json.loads(json.dumps(dict(parsed))) == json.loads(json.dumps(parsed))
    assert pickle.loads(pickle.dumps(parsed)) == copy.deepcopy(parsed) == parsed
    assert {name: parsed[name] for name in report()} == report() | {
        "stages": parsed["stages"],
        "layers": parsed["layers"],
    }


def test_fields_are_attributes_and_keys() -> None:
    parsed = Report.parse(report())
    assert parsed["bits"]["factored"] == parsed.bits.factored == 1.98
    assert parsed["layers"][0]["error"] == parsed.layers[0].error
    assert {"kl", "dense"} <= parsed["evaluation"].keys() and "perplexity" not in parsed["evaluation"]
    assert parsed.get("fingerprint") is None and "fingerprint" not in parsed
    with pytest.raises(KeyError):
        parsed["colour"]


def test_absent_and_null_are_one_and_an_empty_list_stays() -> None:
    shorter = report()
    del shorter["stages"]
    assert Report.parse(report() | {"stages": None}) == Report.parse(shorter)
    empty = Report.parse(report() | {"stages": [], "evaluation": {}})
    assert empty["stages"] == [] and empty["evaluation"] == {} and not empty.evaluation


def test_a_divergence_may_round_below_zero() -> None:
    whole = report()
    whole["stages"][-1]["after"] = -1.5e-8
    assert Report.parse(whole).stages[-1].after < 0
    assert "KL" in report_html(whole)


def test_what_a_newer_version_adds_is_left_alone() -> None:
    assert Report.parse(report() | {"novelty": 1}) == Report.parse(report())


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"settings": 1, "layers": 2}'])
def test_a_folder_without_a_readable_report_has_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    assert read_report(tmp_path) is None
    (tmp_path / REPORT).write_text(json.dumps(report()))
    assert read_report(tmp_path) == Report.parse(report())


@pytest.mark.parametrize("key", ["dbf_compile", "model", "bits", "layers"])
def test_required_keys(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"no '{key}'; .*dbf_report.json is damaged"):
        Report.parse({name: value for name, value in report().items() if name != key})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("", [], r"the report = \[\]; allowed: a mapping"),
        ("dbf_compile", 1, "dbf_compile = 1; allowed: text"),
        ("model", "name", "model = 'name'; allowed: a mapping"),
        ("bits.factored", "2", "bits.factored = '2'; allowed: a finite number of at least 0"),
        ("bits.factored", None, "bits.factored = None"),
        ("bits.file", float("nan"), "bits.file = nan"),
        ("layers", {}, r"layers = \{\}; allowed: a list"),
        ("layers", [], "an empty list of layers"),
        ("layers.1.error", float("inf"), r"layers\[1\].error = inf"),
        ("layers.1.error", -1.0, r"layers\[1\].error = -1.0"),
        ("layers.1.error", True, r"layers\[1\].error = True"),
        ("layers.1.error", 10**400, r"layers\[1\].error = 10*\.\.\.;"),
        ("layers.1.block", 0.5, r"layers\[1\].block = 0.5; allowed: a whole number"),
        ("layers.1.shape", [1, "x"], r"layers\[1\].shape\[1\] = 'x'"),
        ("time.total", "long", "time.total = 'long'"),
        ("settings", [1], r"settings = \[1\]; allowed: a mapping"),
    ],
)
def test_damage_is_named(place: str, value: Any, message: str) -> None:
    spoiled: Any = {"": report()}
    target, *steps = [spoiled, *(int(step) if step.isdigit() else step for step in place.split(".") if step)]
    keys = ["", *steps]
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    with pytest.raises(
        CheckpointError, match=message + ".*dbf_report.json is damaged: compress the model again"
    ):
        Report.parse(spoiled[""])


def test_what_is_printed_names_the_worst_kind_and_a_calibration_of_one_kind() -> None:
    content = report()
    content["data"]["kinds"] = {"web": {"windows": 64}}
    figures = {"kl": 0.9, "top1_agreement": 0.5, "measure": "80 predictions"}
    means = {"kl": 0.6, "top1_agreement": 0.6, "measure": "mean of 2 kinds of text"}
    kinds = {"web": {**figures, "kl": 0.3}, "code": figures}
    content["evaluation"] = {**means, "worst_kind": "code", "kinds": kinds}
    said = str(Compressed(Path("folder"), Report.parse(content)))
    assert "mean of 2 kinds of text: KL 0.6000, top-1 agreement 60.0%" in said
    assert "the worst kind is code: KL 0.9000" in said
    assert "Calibrated with one kind of text alone (web)" in said
