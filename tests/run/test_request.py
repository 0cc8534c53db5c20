"""Requests: what is refused before anything is opened, how windows are split, what the fingerprint depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from support.models.tiny import tiny_llama

from dbf_compile.errors import ConversionError, OptionError, WeightError
from dbf_compile.options import CompressOptions
from dbf_compile.run.request import Request, view_of


def windows(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 256, (1, 8), generator=generator) for _ in range(count)]


def request_for(tmp_path: Path, batches: Any = None, model: Any = None, **options: Any) -> Request:
    config = CompressOptions(device="cpu", **options)
    return Request.of(model or tiny_llama(), tmp_path / "output", config, None, batches, None)


@pytest.mark.parametrize(
    ("count", "holdout", "judged"), [(1, 8, 0), (4, 8, 0), (5, 8, 1), (12, 8, 2), (100, 8, 8), (100, 0, 0)]
)
def test_at_most_a_fifth_of_the_windows_is_kept_back(
    tmp_path: Path, count: int, holdout: int, judged: int
) -> None:
    request = request_for(tmp_path, windows(count), holdout=holdout)
    assert len(request.judging) == judged and len(request.calibrating) == count - judged
    facts = request.data.facts()
    assert facts.windows == count - judged and facts.tokens == 8 * (count - judged)


def test_auto_is_sequential_where_there_is_data(tmp_path: Path) -> None:
    assert request_for(tmp_path, windows(5)).config.mode == "sequential"
    assert request_for(tmp_path).config.mode == "sequential"  # the model writes text itself
    assert request_for(tmp_path, own_text=0).config.mode == "independent"


@pytest.mark.parametrize(
    "change",
    [
        {"bits_per_weight": 3.0},
        {"seed": 1},
        {"skip": ("*o_proj",)},
        {"batches": windows(5, seed=1)},
        {"model": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_depends_on_model_data_and_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = request_for(tmp_path, windows(5)).fingerprint()
    assert request_for(tmp_path, windows(5)).fingerprint() == plain
    if "model" in change:
        other = tiny_llama()
        with torch.no_grad():
            other.model.norm.weight[0] += 1
        change = {"model": other}
    assert request_for(tmp_path, **{"batches": windows(5), **change}).fingerprint() != plain


def test_the_fingerprint_does_not_depend_on_how_the_work_is_done(tmp_path: Path) -> None:
    request = request_for(tmp_path, windows(5))
    config = replace(request.config, progress=False, workers=3, resume="never", keep_work=True)
    assert replace(request, config=config).fingerprint() == request.fingerprint()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": "nowhere/output"}, OptionError, "parent is no folder"),
        ({"data": "text.txt", "batches": []}, OptionError, "data and batches; allowed: one of them"),
        (
            {"config": CompressOptions(mode="sequential", own_text=0)},
            OptionError,
            "mode='sequential' without data",
        ),
        ({"model": nn.Linear(64, 64)}, ConversionError, "convert_ for other modules"),
        ({"model": "no/such-folder-and-name"}, ConversionError, "folder of a pretrained model"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = {"model": tiny_llama(), "config": CompressOptions(), "data": None, "batches": None} | changes
    output = tmp_path / changes.get("output", "output")
    with pytest.raises(error, match=message):
        Request.of(
            arguments["model"], output, arguments["config"], arguments["data"], arguments["batches"], None
        )


def test_a_view_shares_tensors_and_leaves_no_trace() -> None:
    model = tiny_llama()
    view = view_of(model)
    assert view.model.embed_tokens.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    view.model.norm = nn.Identity()  # type: ignore[union-attr]
    assert not isinstance(model.model.norm, nn.Identity)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_named_before_any_work(
    tmp_path: Path, name: str, value: float, dtype: torch.dtype
) -> None:
    model = tiny_llama().to(dtype)
    model.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(
        WeightError, match=f"^{name}: a weight with NaN or infinite entries in LlamaForCausalLM"
    ):
        request_for(tmp_path, windows(5), model)
    assert not list(tmp_path.iterdir())
