"""The benchmark of language models on a laptop: its models are what they are called, and its promises are read rightly."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from support.house import ROOT

pytest.importorskip("transformers")
pytest.importorskip("gguf")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "qwen3-0.6b"])
def test_both_libraries_get_models_of_one_size(module: Any, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = module("laptop_sizes")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**sizes.SIZES[name], tie_word_embeddings=True)
        )
    stored = sum(math.prod(shape) for _, shape in sizes.gguf_shapes(sizes.SIZES[name]))
    assert stored == sum(parameter.numel() for parameter in model.parameters())


def row(variant: str, prompt: int, batch: int, rate: float) -> dict[str, Any]:
    place = {"model": "llama-3.2-1b", "threads": 2, "batch": batch, "prompt": prompt, "commit": "x"}
    return {**place, "variant": variant, "prefill_per_s": rate, "decode_per_s": rate, "resident_mb": 1.0}


def test_promises_are_ratios_of_medians(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bars, bench = module("laptop_bars"), module("bench_laptop")
    rows = [row("dbf 2 bit", 128, 1, rate) for rate in (1.0, 30.0, 40.0)]
    rows += [row(f"llama.cpp {kind}", 128, 1, 10.0) for kind in ("Q4_0", "Q4_K_M", "TQ2_0", "Q2_0", "Q1_0")]
    rows += [row("llama.cpp Q2_K", 128, 1, 15.0), row("dbf 2 bit", 128, 8, 90.0)]
    bars.print_bars(bench.medians(rows))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "MISSED Llama-3.2-1B sizes, decoding, over Q2_K: 2.00 (at least 2.2)" in said
    assert "holds Llama-3.2-1B sizes, decoding, over TQ2_0: 3.00 (at least 1.6)" in said
    assert "holds Llama-3.2-1B sizes, prefill of 128, over the best of llama.cpp: 2.00 (at least 1.2)" in said
    assert "MISSED Llama-3.2-1B sizes, decoding, batch of 8 over one: 3.00 (at least 4.0)" in said
    assert "not measured SmolLM2-135M, decoding, over Q4_1" in said


def test_rounds_begin_with_another_variant(module: Any) -> None:
    rotated = module("bench_laptop").rotated
    assert [rotated(["a", "b", "c"], turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
