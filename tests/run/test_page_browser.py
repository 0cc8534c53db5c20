"""The page of a report in a browser: its colours, and no width at which it scrolls sideways."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
from support.reports import report

from dbf_compile.run.page import report_html, write_report

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
