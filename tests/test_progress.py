"""Progress: whatever may take long is announced before it begins, on stderr, and silent where that is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models.pretrained import FAST, text_of, tiny_folder
from tqdm import tqdm

import dbf_compile
from dbf_compile import progress
from dbf_compile.progress import bar, over, say

# What takes long with a large model: module, and the name by which it calls it.
SLOW = (
    ("transformers", "AutoConfig.from_pretrained"),
    ("transformers", "AutoTokenizer.from_pretrained"),
    ("transformers", "PreTrainedTokenizerFast.__call__"),
    ("transformers", "LlamaForCausalLM.from_pretrained"),
    ("transformers.models.llama.modeling_llama", "LlamaForCausalLM.forward"),
    ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer.forward"),
    ("dbf_compile.integrations.pretrained", "content_hash"),
    ("dbf_compile.factorizer.importance", "Importance.tempered"),
    ("dbf_compile.compression.jobs", "factorize_batch"),
    ("dbf_compile.compression.cache", "tensor_hash"),
    ("dbf_compile.compression.blocks", "factorize"),
    ("dbf_compile.compression.curves", "weighted_error"),
    ("dbf_compile.integrations.folder", "write_tensors"),
    ("dbf_compile.run.folder", "_verify"),
)


class Recorder:
    """Stands for tqdm, and knows at any time what is announced: the bars that are open, or else the last line."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.line: str | None = None
        self.silent: set[str] = set()
        self.heard: dict[str, set[str]] = {}

    def __call__(self, desc: str, disable: bool, **settings: Any) -> Any:
        assert not disable
        recorder = self

        class Bar(tqdm):  # type: ignore[type-arg]
            def __init__(self) -> None:
                recorder.open.append(desc)
                super().__init__(disable=True)

            def close(self) -> None:
                if desc in recorder.open:
                    recorder.open.remove(desc)
                    recorder.line = None
                super().close()

        return Bar()

    def write(self, message: str, file: Any) -> None:
        self.line = message

    def slow(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that takes long, and notes what is announced meanwhile."""

        def call(*args: Any, **kwargs: Any) -> Any:
            said = self.open[-1] if self.open else self.line
            self.heard.setdefault(name, set()).add(str(said))
            if said is None:
                self.silent.add(name)
            return function(*args, **kwargs)

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    pytest.importorskip("transformers")
    recorder = Recorder()
    monkeypatch.setattr(progress, "tqdm", recorder)
    for module, name in SLOW:
        owner: Any = importlib.import_module(module)
        *classes, attribute = name.split(".")
        for one in classes:
            owner = getattr(owner, one)
        function = getattr(owner, attribute)
        slow = recorder.slow(name, function)
        monkeypatch.setattr(owner, attribute, staticmethod(slow) if hasattr(function, "__self__") else slow)
    yield recorder


@pytest.mark.slow
def test_nothing_that_takes_long_is_silent(recorder: Recorder, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "dense", layers=1)
    recorder.heard.clear()
    recorder.silent.clear()
    options = {
        **FAST,
        "progress": True,
        "budget": "allocated",
        "temper": 0.5,
        "cache_dir": tmp_path / "cache",
    }
    dbf_compile.compress(folder, tmp_path / "made", data=text_of(folder), **options)
    dbf_compile.compress(folder, tmp_path / "other", mode="independent", **options)
    dbf_compile.evaluate(tmp_path / "made", text_of(folder), dense=folder, length=16, windows=4)
    assert not recorder.silent and not recorder.open
    assert recorder.heard.keys() == {name for _, name in SLOW}
    whole = recorder.heard["LlamaForCausalLM.forward"]
    assert {"calibrating", "recording", "judging", "distilling", "evaluating"} <= whole
    assert recorder.heard["PreTrainedTokenizerFast.__call__"] == {"reading data"}
    assert "measuring error curves" in recorder.heard["factorize_batch"]


@pytest.mark.slow
def test_without_progress_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    folder = tiny_folder(tmp_path / "dense", layers=1)
    capfd.readouterr()
    dbf_compile.compress(folder, tmp_path / "made", data=text_of(folder), **FAST)
    dbf_compile.evaluate(tmp_path / "made", text_of(folder), length=16, windows=4, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_appears_before_the_first_item_and_knows_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    items = iter(over([5, 6, 7], "counting", "item", True))
    assert next(items) == 5
    assert "counting:   0%" in (said := capsys.readouterr()).err and "0/3" in said.err and not said.out
    assert list(items) == [6, 7]
    assert "counting: 100%" in capsys.readouterr().err
    assert list(over(iter("ab"), "counting", "item", True)) == ["a", "b"]
    assert "2item" in capsys.readouterr().err
    assert list(over(iter("ab"), "counting", "item", True, 2)) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


def test_a_bar_inside_another_leaves_no_trace_and_lines_stand_above(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bar("outer", 2, "item", True) as outer:
        for _ in over(range(3), "inner", "item", True):
            say("a line", True)
        outer.update(2)
    said = capsys.readouterr().err
    assert said.count("a line\n") == 3 and "outer: 100%" in said
    assert "inner:   0%" in said and "inner: 100%" not in said


def test_what_is_not_to_be_shown_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(over(range(3), "counting", "item", False)) == [0, 1, 2]
    with bar("counting", 3, "item", False) as hidden:
        hidden.update(3)
    say("a line", False)
    assert capsys.readouterr() == ("", "")


def test_a_file_gets_few_states_of_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        for _ in over(range(1000), "counting", "item", True):
            pass
    states = (tmp_path / "log").read_text().split("\r")
    assert len([state for state in states if state.strip()]) <= 2  # the beginning and the end
