"""GGUF files: dequantized whole, with tokenizer and settings, or refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from support.models.gguf_files import TEMPLATE, write_gguf
from support.models.pretrained import QUICK
from transformers import AutoModelForCausalLM, AutoTokenizer

import dbf_compile
from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.integrations import pretrained

TOKENS = torch.arange(4, 20)[None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_computes_what_was_written(file: Path, tied: bool) -> None:
    model = write_gguf(file, "F32", tied)
    opened = pretrained.open_dense(pretrained.local_folder(file))
    assert next(opened.parameters()).dtype == torch.float32
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == tied
    torch.testing.assert_close(opened(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_quantized_weights_come_in_16_bits(file: Path) -> None:
    model = write_gguf(file, "Q8_0")
    folder = pretrained.local_folder(file)
    opened = pretrained.open_dense(folder)
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    weight = model.model.layers[1].self_attn.q_proj.weight
    error = (opened.model.layers[1].self_attn.q_proj.weight.float() - weight).abs().max() / weight.abs().max()
    assert error < 2**-7  # half a step of 8 bits, and 8 bits of bfloat16
    assert str(pretrained.file_type(folder)).startswith("GGUF Q8_0, 8.")


def test_a_file_is_dequantized_once(file: Path) -> None:
    write_gguf(file)
    folder = pretrained.local_folder(file)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained.local_folder(file.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_compress_keeps_tokenizer_template_and_settings(file: Path, tmp_path: Path) -> None:
    write_gguf(
        file, "Q4_1", bos=True, entries={"tokenizer.ggml.eot_token_id": 3, "general.sampling.temp": 0.5}
    )
    compressed = dbf_compile.compress(file, tmp_path / "compressed", **QUICK)
    assert compressed.report.model.file_type.startswith("GGUF Q4_1, ")
    assert compressed.report.model.name == "model.gguf"
    tokenizer = AutoTokenizer.from_pretrained(compressed.folder)
    assert tokenizer.chat_template == TEMPLATE and tokenizer("a")["input_ids"][0] == 1
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    settings = model.generation_config
    assert settings.eos_token_id == [2, 3] and settings.temperature == 0.5 and settings.do_sample
    assert model.dtype == torch.bfloat16


def test_a_file_without_its_end_is_refused(file: Path) -> None:
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"which is cut short \([\d,]+ bytes of [\d,]+\)"):
        pretrained.local_folder(file)


NAN = torch.full((64,), float("nan"))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "left out": (
        {"tensors": {"blk.0.attn_q.bias": torch.ones(64)}},
        r"weights, of which LlamaForCausalLM .* reads",
    ),
    "missing": ({"without": ("output_norm.weight",)}, "missing: model.norm.weight"),
    "no numbers": ({"tensors": {"output_norm.weight": NAN}}, "values that are no numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_read_wrong_is_refused(file: Path, case: str) -> None:
    options, message = REFUSED[case]
    write_gguf(file, "F32", **options)
    with pytest.raises((ConversionError, CheckpointError), match=message):
        pretrained.local_folder(file)


def test_an_architecture_that_transformers_does_not_read_is_named(file: Path) -> None:
    write_gguf(file, entries={"general.architecture": "unheard-of"})
    with pytest.raises(ConversionError, match="of architecture 'unheard-of', which transformers"):
        pretrained.local_folder(file)


def test_missing_packages_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbf_compile.integrations import gguf

    write_gguf(file)
    monkeypatch.setattr(gguf, "_PACKAGES", ("gguf", "no-such-package"))
    with pytest.raises(ConversionError, match=r"without the packages no-such-package; .*dbf-compile\[gguf\]"):
        pretrained.local_folder(file)


def test_a_model_that_transformers_dequantized_is_converted_and_saved(file: Path, tmp_path: Path) -> None:
    from transformers import GgufConfig

    write_gguf(file, "Q8_0")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    dbf_compile.convert_(model, bits_per_weight=4.0, iterations=2, progress=False)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
