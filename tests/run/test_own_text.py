"""Text of the model's own within a run: how much of it, durable files, the same after an interruption, in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from support.models.tiny import tiny_bert, tiny_llama

from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.options import CompressOptions
from dbf_compile.run import own_text
from dbf_compile.run.calibration_data import CalibrationData
from dbf_compile.run.own_text import share_of
from dbf_compile.run.work import Work

CPU = torch.device("cpu")
TEXT = ["a line of text " * 60]


def bytewise(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": list(text.encode())}


def data_of(tmp_path: Path, data: Any = None, resume: str = "auto", **options: Any) -> CalibrationData:
    settings = {"windows": 8, "length": 16, "holdout": 4, "progress": False, **options}
    config = CompressOptions(**settings)
    planned, config = CalibrationData.of(tiny_llama(), config, data, None, bytewise if data else None, CPU)
    assert config.mode == "sequential" and (config.length, config.windows) == (16, settings["windows"])
    return planned.written(Work(tmp_path, {"data": planned.hash}, resume), False)


def ids(data: CalibrationData) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in data.calibrating])


@pytest.mark.parametrize(
    ("asked", "data", "batches", "share"),
    [
        (None, None, None, 1.0),
        (None, "text", None, 0.5),
        (None, None, [], 0.0),
        (0.0, None, None, 0.0),
        (0.25, "text", None, 0.25),
        (0.25, None, None, 1.0),
    ],
)
def test_the_share_is_all_without_data_and_what_was_asked_for_beside_it(
    asked: float | None, data: Any, batches: Any, share: float
) -> None:
    assert share_of(tiny_llama(), asked, data, batches) == share


def test_models_that_write_nothing_have_no_share_unless_it_is_asked_for() -> None:
    assert share_of(tiny_bert(), None, None) == 0.0
    with pytest.raises(ConversionError, match="pass data="):
        share_of(tiny_bert(), 0.5, "text")


@pytest.mark.parametrize(
    ("asked", "data", "batches"), [(0.5, None, []), (1.0, "text", None)], ids=["batches", "data"]
)
def test_a_share_without_room_is_refused(asked: float, data: Any, batches: Any) -> None:
    with pytest.raises(OptionError, match=f"own_text={asked} with"):
        share_of(tiny_llama(), asked, data, batches)


def test_half_of_the_windows_beside_data_and_the_report_says_it(tmp_path: Path) -> None:
    facts = data_of(tmp_path, TEXT).facts()
    assert facts.windows == 8 and facts.tokens == 8 * 16
    assert {kind: part.windows for kind, part in (facts.kinds or {}).items()} == {"other": 4, "own text": 4}
    assert facts.one_kind is None
    alone = data_of(tmp_path / "alone").facts()
    assert list(alone.kinds or ()) == ["own text"] and alone.one_kind is None


def test_batches_without_a_batch_are_refused() -> None:
    for batches in ([], iter(())):
        with pytest.raises(OptionError, match="batches without a batch"):
            CalibrationData.of(tiny_llama(), CompressOptions(), None, batches, None, CPU)  # type: ignore[arg-type]


def test_a_run_that_was_stopped_goes_on_with_the_same_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(own_text, "_TOKENS", 3 * 16)  # three windows a file
    whole = data_of(tmp_path / "whole")
    write: Callable[..., Any] = own_text.write_tensors
    files: list[str] = []

    def stop(tensors: Any, header: Any, path: Path) -> None:
        if len(files) == 2:
            raise KeyboardInterrupt
        files.append(path.name)
        write(tensors, header, path)

    monkeypatch.setattr(own_text, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        data_of(tmp_path / "stopped")
    assert files == ["text-0.safetensors", "text-3.safetensors"]
    written: list[str] = []
    monkeypatch.setattr(own_text, "write_tensors", lambda *a: (written.append(a[2].name), write(*a)))
    again = data_of(tmp_path / "stopped")
    assert torch.equal(ids(whole), ids(again)) and written == ["text-6.safetensors", "text-9.safetensors"]
    data_of(tmp_path / "stopped")
    assert len(written) == 2  # all of it was there


def test_what_is_written_is_part_of_the_hash_before_it_is(tmp_path: Path) -> None:
    plain, same, other = (
        CalibrationData.of(tiny_llama(), CompressOptions(length=16, **options), None, None, None, CPU)[0].hash
        for options in ({}, {}, {"own_temperature": 0.7})
    )
    assert plain == same != other
    assert data_of(tmp_path / "a").hash == data_of(tmp_path / "b").hash


def test_windows_are_no_more_than_a_quarter_of_a_million_tokens() -> None:
    model = tiny_llama(max_position_embeddings=2**17)
    for length, windows in ((512, 64), (8192, 32), (2**17, 2)):
        _, config = CalibrationData.of(model, CompressOptions(length=length), None, None, None, CPU)
        assert config.windows == windows


def test_a_model_that_neither_reads_nor_writes_text_of_its_own_says_what_it_has(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="BertModel writes no text of its own"):
        data, config = CalibrationData.of(tiny_bert(), CompressOptions(), None, None, None, CPU)
    assert config.mode == "independent" and data.facts().source == "random tokens" and not data.calibrating
