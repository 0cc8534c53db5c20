"""Limits: positions and vocabulary of models of every kind, and batches that they cannot read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models.tiny import tiny_llama
from torch import nn

from dbf_compile.calibration.limits import Limits, checked, embedded_ids, positions_of, window_length
from dbf_compile.errors import ConversionError, OptionError

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
BART |= {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
ROPE = {"rope_theta": 1e4}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Class, fields of its configuration, positions that it really has.
MODELS: list[tuple[str, dict[str, Any], int | None]] = [
    ("LlamaForCausalLM", {**SIZES, "max_position_embeddings": 32}, 32),
    ("MistralForCausalLM", {**SIZES, "max_position_embeddings": 32, "sliding_window": 8, "num_key_value_heads": 2}, 32),
    ("Qwen2ForCausalLM", {**SIZES, "max_position_embeddings": 32, "num_key_value_heads": 2, "rope_parameters": YARN}, 128),
    ("LlamaForCausalLM", {**SIZES, "max_position_embeddings": 32, "rope_parameters": LLAMA3}, 32),
    ("LlamaForCausalLM", {**SIZES, "max_position_embeddings": 32, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, 64),
    ("GPT2LMHeadModel", {**GPT, "n_positions": 32}, 32),
    ("OpenAIGPTLMHeadModel", {**GPT, "n_positions": 32}, 32),
    ("OPTForCausalLM", {**SIZES, "ffn_dim": 16, "max_position_embeddings": 32, "word_embed_proj_dim": 16}, 32),
    ("BertForMaskedLM", {**SIZES, "max_position_embeddings": 32}, 32),
    ("RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 34, "pad_token_id": 1}, 32),
    ("MPNetForMaskedLM", {**SIZES, "max_position_embeddings": 34, "pad_token_id": 1}, 32),
    ("DistilBertForMaskedLM", {"vocab_size": 40, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}, 32),
    ("BartForConditionalGeneration", {**BART, "max_position_embeddings": 32}, 32),
    ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "n_positions": 8}, None),
    ("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2, "seq_length": 8}, None),
    ("MptForCausalLM", {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}, 32),
    ("FalconForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True, "max_position_embeddings": 8}, None),
    ("MambaForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, None),
    ("DebertaV2ForMaskedLM", {**SIZES, "max_position_embeddings": 8, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}, None),
]  # fmt: skip


def model_of(name: str, fields: dict[str, Any]) -> nn.Module:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = kind(kind.config_class(**fields)).eval()
    return model


@pytest.mark.parametrize(
    ("name", "fields", "positions"), MODELS, ids=[f"{one[0]}-{one[2]}" for one in MODELS]
)
def test_the_positions_are_those_that_the_model_runs_on(
    name: str, fields: dict[str, Any], positions: int | None
) -> None:
    model = model_of(name, fields)
    assert positions_of(model) == positions
    assert embedded_ids(model) == 40
    with torch.no_grad():  # 0 may be padding, which some count no position for
        model(torch.full((1, positions or 50), 2), **_decoder(model))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OPTForCausalLM", "BertForMaskedLM", "RobertaForMaskedLM", "MPNetForMaskedLM", "MptForCausalLM"])  # fmt: skip
def test_one_more_would_fail_inside_the_model(name: str) -> None:
    fields = next(fields for other, fields, _ in MODELS if other == name)
    model = model_of(name, fields)
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 33), 2))


def _decoder(model: nn.Module) -> dict[str, torch.Tensor]:
    encoder_decoder = model.config.is_encoder_decoder  # type: ignore[union-attr]
    return {"decoder_input_ids": torch.tensor([[2, 3]])} if encoder_decoder else {}


def test_a_model_without_a_configuration_has_no_limits() -> None:
    model = nn.Linear(3, 4)
    assert positions_of(model) is None and embedded_ids(model) is None
    batches = [torch.randn(2, 3), {"input_ids": "anything"}]
    assert list(checked(model, batches)) == batches


def test_the_usual_length_is_shortened_and_a_length_asked_for_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_llama()  # 128 positions
    assert window_length(model, None, 100) == 100 == window_length(model, 100, 512) and not caplog.text
    assert window_length(model, None, 512) == 128 and "128 tokens instead of 512" in caplog.text
    with pytest.raises(OptionError, match="length=129 for a model of 128 positions; allowed: 2 to 128"):
        window_length(model, 129, 512)
    assert window_length(nn.Linear(2, 2), None, 512) == 512


IDS = torch.tensor([[1, 2, 3]])
UNREADABLE: dict[str, tuple[Any, str]] = {
    "too long": (torch.ones(1, 129, dtype=torch.int64), "129 tokens for a model of 128 positions"),
    "too high": ({"input_ids": torch.tensor([[1, 256]])}, "token id of 256; allowed: 0 to 255"),
    "negative": ([torch.tensor([[1, -3]])], "token id of -3"),
    "empty": (torch.ones(1, 0, dtype=torch.int64), r"shape \(1, 0\)"),
    "no batch": ({"input_ids": torch.tensor([1, 2])}, r"shape \(2,\)"),
    "floats": ({"input_ids": torch.ones(1, 3)}, "token ids of dtype torch.float32"),
    "bytes": ({"input_ids": IDS.to(torch.uint8)}, "dtype torch.uint8"),
    "lists": ({"input_ids": [[1, 2]]}, "type list.*torch.tensor"),
    "mask": ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, r"attention_mask of shape \(1, 4\)"),
    "label shape": ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels of shape \(1, 2\)"),
    "label": ({"input_ids": IDS, "labels": IDS + 300}, "a label of 301"),
    "negative label": ({"input_ids": IDS, "labels": IDS - 3}, "a label of -2.*by -100"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_a_model_cannot_read_is_refused(name: str) -> None:
    batch, message = UNREADABLE[name]
    model = tiny_llama()
    with pytest.raises(ConversionError, match=f"batch 1: .*{message}"):
        checked(model, [IDS, batch])  # a list is looked at before anything runs
    stream = iter(checked(model, iter([IDS, batch])))
    assert next(stream) is IDS
    with pytest.raises(ConversionError, match=message):
        next(stream)


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        [IDS, IDS],
        (IDS,),
        {"input_ids": IDS.int(), "attention_mask": torch.ones(1, 3), "labels": torch.tensor([[-100, 2, 3]])},
        {"input_ids": IDS, "attention_mask": torch.zeros(1, 1, 3, 3)},
        {"inputs_embeds": torch.randn(1, 3, 64)},
        torch.ones(1, 128, dtype=torch.int64),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_what_a_model_can_read_passes(batch: Any) -> None:
    (same,) = checked(tiny_llama(), [batch])
    assert same is batch


def test_labels_of_a_classifier_are_its_own() -> None:
    limits = Limits(positions=None, vocabulary=10, causal=False)
    limits.check({"input_ids": IDS, "labels": torch.tensor([700])}, "batch 0")


def test_ids_that_stand_for_a_picture_may_lie_outside_of_the_vocabulary() -> None:
    model = tiny_llama()
    model.config.image_token_id = 300  # type: ignore[union-attr]
    checked(model, [torch.tensor([[1, 300]])])
    with pytest.raises(ConversionError, match="token id of 301"):
        checked(model, [torch.tensor([[300, 301]])])


def test_a_single_batch_is_no_list_of_batches() -> None:
    with pytest.raises(ConversionError, match=r"batches of type dict; .*\[batch\]"):
        checked(tiny_llama(), {"input_ids": IDS})


def test_a_larger_embedding_than_the_vocabulary_counts() -> None:
    model = tiny_llama()
    model.resize_token_embeddings(300)  # type: ignore[operator]
    model.config.vocab_size = 256  # type: ignore[union-attr]
    assert embedded_ids(model) == 300
