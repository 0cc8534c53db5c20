"""The charts of the page: series, scales, labels."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.reports import charts, report

from dbf_compile.run.charts import series_of
from dbf_compile.run.page import report_html


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"], ["c_attn", "attn.c_proj", "mlp.c_proj"]),
        (
            ["encoder.layer.3.attention.output.dense", "encoder.layer.3.output.dense"],
            ["attention.output.dense", "output.dense"],
        ),
        (["layers.0.mlp.experts.7.up_proj", "layers.1.mlp.experts.9.up_proj"], ["up"]),
        (["0", "2", ""], ["0", "2", ""]),
    ],
)
def test_kinds_are_the_shortest_endings(names: list[str], kinds: list[str]) -> None:
    assert series_of(names)[1] == kinds


def test_many_kinds_share_the_last_colour() -> None:
    series, kinds = series_of([f"block.0.{letter}" for letter in "abcdefghij"])
    assert series == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7] and kinds == [*"abcdefg", "others"]


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-9, 1.0, 1e299])
def test_any_number_has_a_scale(value: float) -> None:
    whole = report()
    for layer in whole["layers"]:
        layer["error"] = value
    ticks = [text.text for text in charts(report_html(whole))[1].iter("text") if text.get("class") == "y"]
    assert 2 <= len(ticks) <= 6 and len(set(ticks)) == len(ticks)
    assert float(ticks[-1] or 0) >= value


def test_a_thousand_layers_stay_small_and_every_block_axis_stays_legible() -> None:
    page = report_html(report(blocks=250))
    assert len(page) < 1_000_000
    for svg in charts(page):
        assert float(svg.get("viewBox", "").split()[2]) <= 900
        places = [float(text.get("x", "")) for text in svg.iter("text") if text.get("class") == "x"][:-1]
        assert len(places) > 5 and min(b - a for a, b in pairwise(places)) >= 25
