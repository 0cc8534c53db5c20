"""The benchmark of language models by kind of text: its texts, its peers, and that a run which was stopped goes on."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.house import ROOT

pytest.importorskip("transformers")


needs_data = pytest.mark.skipif(
    not (ROOT.parent / "shared" / "data" / "text").exists(), reason="needs ../shared/data"
)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> Any:
    return importlib.import_module(name)


def lines(text: Any) -> set[str]:
    """Return the long lines of a text, of conversations their messages."""
    parts = [
        part for one in text.source for part in (one.split("\n") if isinstance(one, str) else one["messages"])
    ]
    words = [part if isinstance(part, str) else part["content"] for part in parts]
    return {" ".join(one.split()) for one in words if len(one) > 80}


@needs_data
def test_nothing_that_is_judged_with_was_calibrated_with() -> None:
    texts = module("llm_texts")
    judged = texts.judged()
    assert {"web", "code", "dialogues"} <= judged.keys()
    assert all(text.origin and text.characters > 15_000 for text in judged.values())
    own = {kind: lines(text) for kind, text in judged.items()}
    for calibrated in (texts.wikitext() if "encyclopedia" in judged else {}, texts.mixture()):
        for kind, text in calibrated.items():
            others = lines(text)
            assert [name for name, one in own.items() if not one.isdisjoint(others)] == [], kind


def test_conversations_are_plain_text_without_a_template() -> None:
    bench, texts = module("bench_llm"), module("llm_texts")
    text = texts.Text(
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}], ""
    )
    with_template, without = (type("Tokenizer", (), {"chat_template": one}) for one in ("x", None))
    source = [bench.Setting(Path(), one, {}).source(text) for one in (with_template, without)]
    assert source == [text.source, ["user: Hi\n\nassistant: Yes"]]


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 7), (5, 130), (1, 1)])
def test_gptq_stays_on_its_levels_and_gains_where_inputs_are_related(
    bits: int, shape: tuple[int, int]
) -> None:
    peers = module("llm_peers")
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(shape, generator=generator)
    grid = peers.Grid(bits, 6)
    levels = peers.levels_of(weight, grid)
    nearest = levels.nearest(weight)
    assert torch.equal(levels.nearest(nearest), nearest)
    assert torch.allclose(peers.gptq(weight, torch.eye(shape[1]), grid), nearest)
    x = torch.randn(400, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    curvature = x.T @ x / len(x)
    better = peers.gptq(weight, curvature, grid)
    assert torch.allclose(levels.nearest(better), better)

    def loss(approximation: torch.Tensor) -> float:
        error = approximation - weight
        return float(((error @ curvature) * error).sum())

    assert loss(better) <= loss(nearest) * (1 + 1e-6) or shape[1] < 100


def test_stored_bits_count_scales_and_zeros() -> None:
    peers = module("llm_peers")
    weight = torch.zeros(4, 192)
    assert peers.Grid(2, 192).stored_bits(weight) == 4 * (2 * 192 + 18)
    assert peers.Grid(2, 100).stored_bits(weight) == 4 * (2 * 192 + 2 * 18)
    assert peers.Grid(1, 32).stored_bits(weight) == 1.5 * weight.numel()
    for target, grid in peers.GRIDS.items():
        if target in (1, 1.5, 2, 3, 4):
            assert target <= grid.stored_bits(weight) / weight.numel() <= 1.09 * target


def figures(kl: float) -> dict[str, Any]:
    return {"length": 512, "windows": 4, "kl": kl, "nats_lost": kl, "top1_agreement": 0.5, "compressed": 3.0}


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows, measure = module("llm_rows"), module("measure")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    every = [rows.Row("independent", bits, "mixture") for bits in (2.0, 1.0, 1.5)]
    store = rows.Store(tmp_path, {"windows": 4})
    stage = {"stage": "tune", "measure": "error", "blocks": 2, "before": 1.0, "after": 0.5, "seconds": 3.0}
    for row in rows.in_turn(every, store):
        store.add(
            row, {"stored_bits": 1.97, "seconds": 60.0, "kinds": {"web": figures(0.4)}, "stages": [stage]}
        )
        break  # killed after the first
    again = rows.Store(tmp_path, {"windows": 4})
    assert [row.name for row in rows.in_turn(every, again)] == [row.name for row in every[1:]]
    assert "1 of 3 rows are there already" in capsys.readouterr().out
    assert not rows.Store(tmp_path, {"windows": 5}).has(every[0])
    again.write("tiny")
    with (measure.RESULTS / "llm.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["kind"], line["kl"], line["bits"], line["commit"]) == (
        "web",
        "0.4",
        "1.97",
        measure.commit(),
    )
    with (measure.RESULTS / "llm_stages.csv").open() as file:
        assert [line["after"] for line in csv.DictReader(file)] == ["0.5"]
    assert json.loads(again.path(every[0]).read_text())["setting"] == {"windows": 4}


@needs_data
def test_rows_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module("bench_llm")
    rows = []
    for words in ((), ("--calibrating", "256", "--tokens", "4000")):
        monkeypatch.setattr("sys.argv", ["bench_llm.py", *words])
        rows += [row for row in bench.all_rows(bench.parse_arguments()) if row.calibrating or not words]
    assert len({row.name for row in rows}) == len(rows) > 60
    monkeypatch.setattr("sys.argv", ["bench_llm.py", "--bits", "2", "--mode", "independent"])
    names = {row.name for row in bench.chosen(bench.parse_arguments())}
    assert names == {f"2-independent-{text}-0" for text in ("mixture", "wikitext", "own")}
    monkeypatch.setattr("sys.argv", ["bench_llm.py", "--row", "no-such-row"])
    with pytest.raises(SystemExit, match="no row no-such-row"):
        bench.chosen(bench.parse_arguments())


def test_what_was_trained_and_not_judged_is_kept_until_its_base_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, rows, trained = module("bench_llm"), module("llm_rows"), []
    row = rows.Row("end to end", 2.0, "mixture", tokens=4000)
    fingerprints = {row.name: "a", "2-sequential-mixture-0": "a"}

    def report(folder: Path) -> Any:
        bits = type("Bits", (), {"factored": 2.0})
        own = {"fingerprint": fingerprints[folder.name], "bits": bits, "stages": (), "time": {}}
        return type("Report", (), own)

    def finetune(*_: Any, **__: Any) -> None:
        trained.append(1)

    monkeypatch.setattr(bench, "read_report", report)
    monkeypatch.setattr(bench, "ours", lambda *_: None)
    monkeypatch.setattr(bench, "loaded", lambda folder: folder)
    monkeypatch.setattr(bench.llm_texts, "training", dict)
    monkeypatch.setattr(bench.dbf_compile, "finetune", finetune)
    setting, store = bench.Setting(tmp_path, None, {}), rows.Store(tmp_path, {})
    bench.end_to_end(row, None, setting, store)
    assert not trained
    fingerprints[row.name] = "b"
    bench.end_to_end(row, None, setting, store)
    assert trained


@pytest.mark.slow
def test_a_quick_run_judges_ours_and_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = module("bench_llm")
    if not bench.STORIES.exists():
        pytest.skip("no stories260K")
    monkeypatch.setattr("sys.argv", ["bench_llm.py", "--quick", "--windows", "1"])
    bench.main()
    said = capsys.readouterr().out
    for name in ("2-round_to_nearest-none-0", "2-GPTQ-mixture-0", "2-independent-mixture-0"):
        assert name in said
    assert said.count("dialogues  ") == 3 and "rows of llm not written" in said
