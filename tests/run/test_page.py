"""The page of a report: what it says, what it leaves out, and that a browser draws it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dbf_compile.errors import CheckpointError
from dbf_compile.run import page as report_module
from dbf_compile.run.page import report_html, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADINGS = {
    "stages": "What each stage gained",
    "coverage": "What is factored and what stays dense",
    "time": "Where the time went",
    "data": "Data",
    "settings": "Settings",
}
KINDS = ("self_attn.q_proj + self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def report(blocks: int = 3) -> dict[str, Any]:
    """Return a whole report, with one more layer outside of the blocks."""
    layers = [
        {
            "name": " + ".join(f"model.layers.{block}.{part}" for part in kind.split(" + ")),
            "shape": [192, 64],
            "mid_features": 1080,
            "bits_per_weight": 1.9 + 0.1 * index,
            "error": 0.04 + 0.01 * index + 0.001 * block,
            "seconds": 1.2,
            "block": block,
        }
        for block in range(blocks)
        for index, kind in enumerate(KINDS)
    ]
    stages = [
        {
            "stage": "tune",
            "block": block,
            "measure": "error of the block's output",
            "before": 0.02,
            "after": 0.012,
        }
        for block in range(blocks)
    ]
    made = {
        "dbf_compile": "0.1.0",
        "created": "2026-11-25T09:00:00+00:00",
        "model": {
            "name": "stories260K",
            "architecture": "LlamaForCausalLM",
            "parameters": 263232,
            "hash": "5e" * 32,
        },
        "data": {"source": "text.txt", "hash": "da" * 32, "windows": 64, "tokens": 32768},
        "settings": {"mode": "block", "skip": ["lm_head"], "overrides": {"*.down_proj": 2.5}, "seed": 1234},
        "bits": {"target": 2.0, "factored": 1.98, "file": 4.2},
        "coverage": {
            "share": 0.86,
            "dense": [
                {"name": "model.embed_tokens", "weights": 32768, "share": 0.124, "reason": "embedding"},
                {"name": "model.norm", "weights": 64, "share": 0.0002, "reason": "not a matrix"},
            ],
        },
        "layers": [*layers, {"name": "lm_head", "bits_per_weight": 3.0, "error": None, "block": None}],
        "stages": [
            *stages,
            {
                "stage": "distill",
                "block": None,
                "measure": "KL",
                "before": 0.4,
                "after": 0.3,
                "seconds": 4000.0,
            },
        ],
        "evaluation": {
            "measure": "nats per token on 16 held-out windows",
            "dense": 1.213,
            "compressed": 1.434,
            "kl": 0.2,
            "top1_agreement": 0.83,
        },
        "time": {"calibrate": 3.0, "factor": 20.1, "total": 130.0},
        "memory": {"peak_bytes": 123456789},
        "machine": {"processor": "Xeon", "cores": 2, "torch": "2.13.0", "python": "3.11.7"},
    }
    return json.loads(json.dumps(made))


class Page(HTMLParser):
    """The words of a page, its attributes, and whether every tag is closed where it should be."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def charts(page: str) -> list[ElementTree.Element]:
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return [svg for svg in drawn if svg.get("role") == "img"]


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


@pytest.mark.parametrize("key", ["dbf_compile", "model", "bits", "layers"])
def test_required_keys(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"no '{key}'; .*dbf_report.json is damaged"):
        report_html({name: value for name, value in report().items() if name != key})


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
        report_html(spoiled[""])


def test_the_report_is_not_changed() -> None:
    given = report()
    before = copy.deepcopy(given)
    report_html(given)
    assert given == before


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
    assert report_module._series(names)[1] == kinds


def test_many_kinds_share_the_last_colour() -> None:
    series, kinds = report_module._series([f"block.0.{letter}" for letter in "abcdefghij"])
    assert series == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7] and kinds == [*"abcdefg", "others"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")

    def run(*arguments: str) -> str:
        fixed = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
        )
        command = [CHROMIUM, *fixed, f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it(browser: Any, tmp_path: Path, dark: bool) -> None:
    image_module = pytest.importorskip("PIL.Image")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    write_report(report(), page)
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browser(*scheme, "--window-size=1100,1500", f"--screenshot={picture}", page.as_uri())
    image = image_module.open(picture).convert("RGB")
    assert image.size == (1100, 1500)
    colours = {colour: number for number, colour in image.getcolors(1 << 24)}
    paper = (0x13, 0x16, 0x19) if dark else (0xFC, 0xFC, 0xFB)
    series = (
        [(0x6C, 0x98, 0xFB), (0xF6, 0x94, 0x4B), (0x3F, 0xBF, 0x93), (0xDB, 0x74, 0xBD)]
        if dark
        else [(0x3A, 0x6B, 0xD8), (0xE2, 0x76, 0x1F), (0x1C, 0x9A, 0x73), (0xB0, 0x40, 0x8F)]
    )
    assert max(colours, key=colours.__getitem__) == paper
    # The bars of every kind of layer: three of some twelve by hundred pixels.
    assert all(colours.get(colour, 0) > 2000 for colour in series)


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_no_width_scrolls_sideways(browser: Any, tmp_path: Path, width: int) -> None:
    whole = report(blocks=40)
    whole["model"]["name"] = whole["settings"]["x" * 90] = whole["layers"][0]["name"] = "long" * 40
    measure = (
        "document.title = ['scrollWidth', 'clientWidth'].map(x => frames[0].document.documentElement[x])"
    )
    frame = tmp_path / "frame.html"
    # Windows have a least width, frames have none.
    frame.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(report_html(whole))}"></iframe>'
        f"<script>onload = () => {{ {measure} }}</script>",
        encoding="utf-8",
    )
    found = re.search(r"<title>(\d+),(\d+)</title>", browser("--dump-dom", frame.as_uri()))
    assert found and found.groups() == (str(width), str(width))
