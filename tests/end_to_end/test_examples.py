"""Every program in examples/ runs as a user would run it, and is short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from support.house import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 60  # lines
# What a program prints when it has done what it shows.
SHOWS = {
    "budgets_and_importance": "importance kronecker  budget allocated",
    "compile_your_module": "compiled and eager differ by",
    "compress_language_model": "top1_agreement",
    "sentence_encoder": "cosine with the dense embeddings",
    "serve": "answer: ",
    "train_lora": "at the end  loss",
}

NEEDS = {"serve": "vllm", "train_lora": "peft"}  # packages that may be absent


def test_there_are_examples_of_everything():
    assert {path.stem for path in EXAMPLES} == SHOWS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path):
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert SHOWS[path.stem] in capsys.readouterr().out
