"""The page of a report: what it says, what it leaves out, and that a browser draws it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from support.reports import Page, charts, report

from dbf_compile.errors import CheckpointError
from dbf_compile.run.page import report_html, update_evaluation, write_report
from dbf_compile.run.report import Report, read_report

HEADINGS = {
    "stages": "What each stage gained",
    "coverage": "What is factored and what stays dense",
    "operations": "What a token costs",
    "time": "Where the time went",
    "data": "Data",
    "settings": "Settings",
}


@pytest.mark.parametrize(
    "fact",
    [
        "stories260K at 2 bits",
        "86.0 % of the 263,232 weights of this LlamaForCausalLM",
        "1.98 bits per factored weight target 2",
        "4.20 bits per weight of the whole file 3.8 times smaller than at 16 bits",
        "1.213 → 1.434 nats per token on 16 held-out windows",
        "0.2 KL divergence from the dense model same first choice for 83.0 % of tokens",
        "2 min 10 s total time",
        "123 MB peak memory",
        "Median 2.10, from 1.90 to 3.00 in lm_head.",
        "from 0.04 to 0.072 in model.layers.2.mlp.down_proj.",
        "q + k o up down lm_head",  # the legend
        "tune error of the block's output 3 0.02 0.012 −40.0 % –",
        "distill KL whole model 0.4 0.3 −25.0 % 1 h 6 min",
        "factored 86.0 % embedding 12.4 % not a matrix < 0.1 % other dense weights 1.6 %",
        "factored 40.5 % everything else 59.5 %",
        "model.embed_tokens embedding 32,768 12.4 %",
        "factored 500,000 130,000 140,000 8,000 dense 32,256 0 32,256 32,768 all 532,256 130,000 172,256 40,768",
        "all, in the dense model 260,000 0 260,000 262,144 Experts that a token reaches: 2 of 8.",
        "Not counted: 64 weights of other modules",
        "model.layers.2.mlp.down_proj 275,208 69,504 75,144 1,336 12,288",
        "calibrate 3.0 s factor 20.1 s everything else 1 min 47 s",
        "hash " + "5e" * 32,
        "source text.txt windows 64 tokens 32,768 hash " + "da" * 32,
        'mode block skip ["lm_head"] overrides {"*.down_proj": 2.5} seed 1234',
        "dbf_compile 0.1.0 made 2026-11-25 09:00:00 UTC processor Xeon cores 2 torch 2.13.0 python 3.11.7",
        "1 model.layers.1.self_attn.q_proj + k_proj 192 × 64 1,080 1.90 0.041 1.2 s",
        "– lm_head – – 3.00 – –",
    ],
)
def test_the_page_says(fact: str) -> None:
    assert fact in Page(report_html(report())).text.replace("\u202f", " ")


def by_kind() -> dict[str, Any]:
    """Return a report whose evaluation has two kinds of text, one of which was calibrated with."""
    content = report()
    content["data"]["kinds"] = {"web": {"source": "web.txt", "windows": 64, "tokens": 32768}}
    code = {"kl": 0.9, "nats_lost": 0.8, "top1_agreement": 0.5, "measure": "80 predictions"}
    web = {"kl": 0.3, "nats_lost": 0.2, "top1_agreement": 0.7, "measure": "80 predictions"}
    means = {"kl": 0.6, "nats_lost": 0.5, "top1_agreement": 0.6, "measure": "mean of 2 kinds of text"}
    content["evaluation"] = {**means, "worst_kind": "code", "kinds": {"web": web, "code": code}}
    return content


def test_every_kind_of_text_has_a_column() -> None:
    text = Page(report_html(by_kind())).text.replace("\u202f", " ")
    for fact in (
        "web code (worst) mean KL divergence from the dense model 0.3 0.9 0.6",
        "nats a token lost 0.2 0.8 0.5 same first choice 70.0 % 50.0 % 60.0 %",
        "windows of the kind calibrated with 64 0 64",
        "Calibrated with one kind of text alone (web): other kinds may have lost more",
        "Text of the kind web source web.txt windows 64 tokens 32,768",
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"source": "wiki.txt"}, True),
        ({"source": "batches"}, False),
        ({"source": "random tokens"}, False),
        ({"source": "a, b", "kinds": {"web": {}, "code": {}}}, False),
        (None, False),
    ],
)
def test_one_kind_of_text_alone_is_said(data: dict[str, Any] | None, said: bool) -> None:
    content = {**report(), "data": data}
    assert ("one kind of text alone" in report_html(content)) == said


def test_an_evaluation_is_written_into_report_and_page(tmp_path: Path) -> None:
    before, measured = Report.parse(report()), by_kind()["evaluation"]
    update_evaluation(tmp_path, before, {"context_length": 512, "windows": 4, **measured})
    after = read_report(tmp_path)
    assert after is not None and after.evaluation == measured and after.layers == before.layers
    assert (tmp_path / "dbf_report.html").read_text() == report_html(after)


def test_every_layer_and_every_block_of_a_stage_is_drawn() -> None:
    bits, error, tune = charts(report_html(report()))
    titles = [title.text for title in bits.iter("title")]
    assert titles[0] == "model.layers.0.self_attn.q_proj + k_proj: 1.9" and titles[-1] == "lm_head: 3"
    assert len(titles) == len(list(bits.iter("rect"))) == 13
    assert len(list(error.iter("title"))) == 12 and len(list(error.iter("polyline"))) == 4
    assert [title.text for title in tune.iter("title")] == [f"block {i}: 0.02 → 0.012" for i in range(3)]


def test_bars_are_as_high_as_their_values() -> None:
    heights = [float(bar.get("height", "")) for bar in charts(report_html(report()))[0].iter("rect")]
    assert heights == pytest.approx([y * heights[-1] / 3 for y in [1.9, 2.0, 2.1, 2.2] * 3 + [3.0]], abs=0.1)


@pytest.mark.parametrize("section", HEADINGS)
def test_an_absent_section_is_left_out(section: str) -> None:
    whole = report()
    heading = f">{HEADINGS[section]}</h"
    assert heading in report_html(whole)
    for absent in ({}, {section: None}, {section: type(whole[section])()}):
        rest = {key: value for key, value in whole.items() if key != section} | absent
        assert heading not in report_html(rest)


def test_the_least_report_is_a_page() -> None:
    least = {
        "dbf_compile": "0.1.0",
        "model": {"name": "tiny"},
        "bits": {"factored": 1.5},
        "layers": [{"name": "0", "bits_per_weight": 1.5}],
    }
    page = report_html(least)
    assert page.startswith("<!DOCTYPE html>\n<html")
    text = Page(page).text
    assert "tiny at 1.5 bits" in text and len(charts(page)) == 1
    for missing in ("None", "total time", "peak memory", "KL", "nats", *HEADINGS.values()):
        assert missing not in text


def test_shares_that_cannot_be_known_are_left_out() -> None:
    whole = report()
    whole["time"] = {"total": 3.0}
    for size in (None, 1.0):  # unknown, and too small for what is factored
        whole["bits"]["file"] = size
        text = Page(report_html(whole)).text
        assert "Of the weights" in text and "Of the file" not in text and HEADINGS["time"] not in text
        assert "3.0 s total time" in text


HOSTILE = '<script>alert(1)</script>"\' onload="x" </title></style>]]> {{ 7 * 7 }} & co'


def test_names_are_text() -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return HOSTILE if isinstance(value, str) else value

    spoiled = spoil(report())
    spoiled["settings"][HOSTILE] = spoiled["machine"][HOSTILE] = {HOSTILE: HOSTILE}
    spoiled["time"][HOSTILE] = 1.0
    text = report_html(spoiled)
    page = Page(text)
    assert "script" not in page.tags and "onload" not in dict(page.attributes)
    assert HOSTILE in page.text and "49" not in page.text
    assert len(charts(text)) == 3


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = report_html(report())
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|@import|url\(", text)


def test_halves_of_characters_can_be_written(tmp_path: Path) -> None:
    whole = report()
    whole["model"]["name"] = "half \ud83d"
    write_report(whole, tmp_path / "report.html")
    assert "half ? at 2 bits" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(report(), path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="damaged"):
        write_report(report() | {"bits": None}, path)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"no space left.*choose another path"):
        write_report(report(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*existing, writable folder"):
        write_report(report(), tmp_path / "nowhere" / "report.html")


def test_the_report_is_not_changed() -> None:
    given = report()
    before = copy.deepcopy(given)
    report_html(given)
    assert given == before
