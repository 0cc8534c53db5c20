"""Compressed folders with tables of quantized rows: loaded by every class, saved again, damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import dbf_compile
from dbf_compile.candidates import tables as candidates
from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.integrations.tables import check_entries
from dbf_compile.tables import QuantizedEmbedding, QuantizedLinear

FAST: dict[str, Any] = {"bits": 3.0, "iterations": 2, "progress": False}
RANDOM_TOKENS: dict[str, Any] = {"own_text": 0}
IDS = torch.arange(6)[None] * 7


@pytest.fixture(scope="module", autouse=True)
def small_tables_count() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "MIN_WEIGHTS", 64 * 64)
        yield


def llama(tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tied") / "out"
    dbf_compile.compress(llama(), output, **FAST, **RANDOM_TOKENS)
    return output


def entries(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]  # type: ignore[no-any-return]


def test_a_tied_table_is_stored_once_and_read_by_both(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes["model.embed_tokens.rows"] == [100, 17] and shapes["model.embed_tokens.weight"] == [100, 0]
    assert not any(key.startswith("lm_head") for key in shapes)
    assert entries(folder)["dbf_format_version"] == 3
    assert entries(folder)["tables"]["lm_head"] == {"kind": "int8", "shares_rows_with": "model.embed_tokens"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.lm_head, QuantizedLinear) and isinstance(
        model.model.embed_tokens, QuantizedEmbedding
    )
    assert model.lm_head.rows is model.model.embed_tokens.rows and model.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.bfloat16
    model.tie_weights()
    assert model.lm_head.rows is model.model.embed_tokens.rows


def test_every_class_loads_it_and_saves_it_again(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, expected)
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.embed_tokens, QuantizedEmbedding)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "base")(IDS).logits, expected)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == wide(IDS).logits.dtype == torch.float32


def test_offloaded_tables_compute_the_same(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    for place in (places, {"": "cpu"}, {**places, "model.embed_tokens": "disk", "lm_head": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=dict(place), offload_folder=tmp_path)
        assert torch.equal(model(IDS).logits, expected)


def test_inspection_counts_tables(folder: Path) -> None:
    seen = dbf_compile.inspect(folder)
    assert seen["verified"] and seen["dense"][0]["reason"] == "a table of int8 rows"
    weights = sum(parameter.numel() for parameter in llama().parameters())
    assert seen["file"] == 8 * (folder / "model.safetensors").stat().st_size / weights


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"head": "int6", "embedding": "int4"}),
        (True, {"head": "int4", "embedding": "int8"}),
        (True, {"head": 5.0}),
        (True, {"head": "int8", "embedding": "dense"}),
        (True, {"head": "dense"}),
    ],
)
def test_pairs_of_options_come_back(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    model = dbf_compile.convert_(llama(tied, torch.float32), **FAST, **options)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded.lm_head) is type(model.lm_head)
    assert type(loaded.model.embed_tokens) is type(model.model.embed_tokens)
    assert torch.equal(loaded(IDS).logits, expected)


def test_encoder_and_decoder_share_one_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    dbf_compile.compress(model, tmp_path / "out", **FAST, **RANDOM_TOKENS)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    readers = (loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens, loaded.lm_head)
    assert len({id(reader.rows) for reader in readers}) == 1
    assert torch.isfinite(loaded(input_ids=IDS, decoder_input_ids=IDS).logits).all()


def test_rows_are_not_resized(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.resize_token_embeddings(100) is model.model.embed_tokens
    for sizes in ({"new_num_tokens": 101}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ConversionError, match="quantized rows to be resized"):
            model.resize_token_embeddings(**sizes)
    assert model(IDS).logits.shape == (1, 6, 100)


def test_adapters_stand_beside_tables(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(IDS).logits
    with pytest.raises(ConversionError, match="modules_to_save='lm_head'"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"])
    )
    assert torch.equal(adapted(IDS).logits, expected)
    adapted(IDS).logits.float().sum().backward()
    trained = {
        name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in adapted.named_parameters() if p.requires_grad
    }
    assert trained == {"q_proj", "lm_head", "embed_tokens"}


@pytest.mark.parametrize(
    "tables",
    [
        [],
        {"a": {"kind": "int3"}},
        {"a": []},
        {"a": {"kind": "int8", "shares_rows_with": "b"}},
        {"a": {"kind": "int8", "shares_rows_with": "b"}, "b": {"kind": "int4", "shares_rows_with": None}},
        {"a": {"kind": "int8", "shares_rows_with": "a"}},
    ],
)
def test_entries_that_nobody_wrote_are_refused(tables: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: table"):
        check_entries(tables)


def test_a_damaged_table_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = tmp_path / "damaged"
    shutil.copytree(folder, place)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.rows"][0, 0] = torch.tensor(float("nan")).view(torch.int32)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(CheckpointError, match="NaN or infinite scales"),
        pytest.warns(UserWarning, match="saved again"),
    ):
        AutoModelForCausalLM.from_pretrained(place)
    del tensors["model.embed_tokens.rows"]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(CheckpointError, match="without rows"),
        pytest.warns(UserWarning, match="saved again"),
    ):
        AutoModelForCausalLM.from_pretrained(place)


def test_a_trained_model_keeps_its_tables() -> None:
    model = dbf_compile.convert_(llama(dtype=torch.float32), **FAST).train()
    norm: nn.Parameter = model.model.norm.weight
    before = model.model.embed_tokens.rows.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert norm.grad is not None and torch.equal(model.model.embed_tokens.rows, before)
