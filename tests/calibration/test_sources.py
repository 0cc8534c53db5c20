"""Sources: paths, folders, patterns, data sets and tables give the documents that they hold, or say what to do."""

from __future__ import annotations

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dbf_compile.calibration.sources import documents, name_of
from dbf_compile.errors import ConversionError, DBFError

TEXTS = ["one two", "three", "four"]
ROWS = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
needs_datasets = pytest.mark.skipif(
    find_spec("datasets") is None, reason="the datasets package is not installed"
)


def read(source: Any, column: str | None = None, split: str | None = None) -> list[Any]:
    return [document.content for document in documents(source, None, column, split)]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_every_way_to_name_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    for source in (
        path,
        str(path),
        "a.jsonl",
        "*.jsonl",
        "[ab].jsonl",
        str(tmp_path / "?.jsonl"),
        tmp_path,
        ".",
    ):
        assert read(source) == TEXTS, source
    for source in ([path, path], ("a.jsonl", "a.jsonl"), [tmp_path, Path("*.jsonl")]):
        assert read(source) == 2 * TEXTS, source
    assert name_of(path) == str(path) and name_of([path, "a.jsonl"]) == f"{path}, a.jsonl"
    assert name_of(TEXTS) == name_of(ROWS) == name_of(iter(TEXTS)) == "texts"


def test_a_folder_gives_its_files_of_data_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.jsonl", ["two"])
    write(tmp_path / "b" / "1.jsonl", ["one"])
    write(tmp_path / "a.jsonl", ["zero"])
    for other in (
        ".hidden.jsonl",
        "_more/x.jsonl",
        "dataset_info.json",
        "README.md",
        "picture.png",
        "LICENSE.txt",
    ):
        write(tmp_path / other, ["no data"])
    assert read(tmp_path) == ["zero", "one", "two"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConversionError, match=r"nothing.*no file in it ends in .jsonl"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train/0.jsonl", "test/0.jsonl"), ("my-train-00.jsonl", "my-test-00.jsonl")])  # fmt: skip
def test_files_of_several_splits_are_not_mixed(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, [name])
    assert read(tmp_path, split="train") == [names[0]]
    assert read(tmp_path, split="test") == [names[1]]
    with pytest.raises(ConversionError, match="splits 'test', 'train'"):
        read(tmp_path)
    with pytest.raises(ConversionError, match="without 'validation'"):
        read(tmp_path, split="dev")
    (tmp_path / names[1]).unlink()
    assert read(tmp_path) == [names[0]]


@pytest.mark.parametrize(
    "source", ["/no/such/file", "nothing.jsonl", "no/*.txt", "a text, not a path", "x" * 5000, ["gone.jsonl"], Path("gone.csv")],
    ids=lambda source: str(source)[:20],
)  # fmt: skip
def test_what_is_not_there_is_not_looked_for_on_the_hub(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(ConversionError, match=r"cannot be read \(no .*\[text\]"):
        read(source)


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext", "Salesforce/wikitext:wikitext-2-raw-v1"])
def test_a_name_is_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, configuration: str | None, streaming: bool) -> Any:
        calls.append((path, configuration, streaming))
        return {"train": ROWS, "test": ROWS[:1]}

    hub = SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read(name, split="test") == TEXTS[:1]
    assert calls == [(*(name.split(":") if ":" in name else (name, None)), True)]
    with pytest.raises(ConversionError, match=r"splits 'train', 'test'.*pass split="):
        read(name)

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(hub, "load_dataset", fail)
    with pytest.raises(
        ConversionError, match=r"no file here.*\(Couldn't reach the Hub \(offline\)\).*check the path"
    ):
        read(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConversionError, match=r"without the package datasets.*pip install 'dbf-compile\[data\]'"
    ):
        read(name)


@needs_datasets
@pytest.mark.slow
def test_data_sets_in_memory_and_on_disk(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": data, "test": data.select([0])})
    for source in (
        data,
        data.to_iterable_dataset(),
        datasets.DatasetDict({"train": data}),
        data[:],
        data[:]["text"],
    ):
        assert read(source) == TEXTS
    data.save_to_disk(str(tmp_path / "one"))
    splits.save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == TEXTS
    for source in (splits, tmp_path / "two"):
        assert read(source, split="test") == TEXTS[:1]
        with pytest.raises(ConversionError, match="splits 'train', 'test'"):
            read(source)
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ConversionError, match="save it again"):
        read(tmp_path / "one")


class Polars:
    """As far as a frame of polars is asked."""

    def iter_rows(self, named: bool) -> Any:
        assert named
        return iter(ROWS)


class Arrow:
    """As far as a table of pyarrow is asked."""

    def to_pylist(self) -> Any:
        return ROWS


class Pandas:
    """As far as a frame of pandas is asked; it iterates over the names of its columns."""

    columns = ("text", "n")

    def to_dict(self, kind: str) -> Any:
        assert kind == "records"
        return ROWS

    def __iter__(self) -> Any:
        return iter(self.columns)


@pytest.mark.parametrize(
    "source",
    [TEXTS, tuple(TEXTS), iter(TEXTS), ROWS, iter(ROWS), {"text": TEXTS}, {"data": ROWS}, {"train": ROWS}, Polars(), Arrow(), Pandas(), {"train": Pandas()}],
    ids=lambda source: type(source).__name__,
)  # fmt: skip
def test_tables_and_iterables_are_read_row_by_row(source: Any) -> None:
    assert read(source) == TEXTS


def test_ids_in_tensors_are_rows() -> None:
    assert read(torch.arange(6).view(2, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert read({"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3)}) == [
        [0, 1, 2],
        [3, 4, 5],
    ]


@pytest.mark.parametrize(
    "source",
    [3, None, b"bytes", io.StringIO("text"), io.BytesIO(b"text")],
    ids=lambda source: type(source).__name__,
)
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(ConversionError, match=r"source of type .*pass its path, or \[text\]"):
        read(source)


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for source in (TEXTS, ROWS[0], rows, tmp_path / "a.json"):
        with pytest.raises(ConversionError, match="data without splits"):
            read(source, split="train")


@pytest.mark.parametrize("rows", [[{"text": None}] * 3, [{"text": float("nan")}] * 3, [{"messages": []}] * 3])
def test_rows_that_all_lack_their_text_are_no_empty_source(rows: Any) -> None:
    with pytest.raises(ConversionError, match="3 rows without a text"):
        list(documents(rows, None, None, None))
    assert list(documents([], None, None, None)) == []


@pytest.mark.parametrize("name", ["", "link"])
def test_no_path_and_a_link_that_leads_nowhere(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    Path("a.txt").write_text("not asked for")
    with pytest.raises(DBFError, match=r"an empty path|a link to nowhere"):
        list(documents(name, None, None, None))
