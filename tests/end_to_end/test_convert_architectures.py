"""Converted models of many architectures compute what the dense ones compute; what they read without a call stays dense."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.models.tiny import error_of
from torch import nn

import dbf_compile
from dbf_compile.linear import DoubleBinaryLinear

transformers = pytest.importorskip("transformers")

V, D = 64, 32
TEXT = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT |= {"max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
T5 = {"vocab_size": V, "d_model": D, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
MAMBA = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 16}
JAMBA = {
    **TEXT,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
}
JAMBA |= {"num_experts": 1, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_dt_rank": 16}
SPEECH = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SPEECH |= {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": D, "depths": [1], "num_heads": [2], "window_size": 4}
FUNNEL = {"vocab_size": V, "block_sizes": [1], "d_model": D, "n_head": 2, "d_head": 16, "d_inner": 64}
GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32}
SWITCH = {
    **T5,
    "num_experts": 1,  # of several, another would be chosen where two are close
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_sparse_decoder_layers": 0,
}
SIGLIP = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP |= {"image_size": 16, "patch_size": 8}
# Class without "Model" and "Config", sizes, inputs, and the last names of layers that are read without a call.
KINDS: dict[str, tuple[str, Mapping[str, Any], str, str]] = {
    "T5": ("T5", T5, "both", ""),
    "Switch": ("SwitchTransformers", SWITCH, "both", ""),
    "Mamba": ("Mamba", MAMBA, "text", "dt_proj"),
    "Jamba": ("Jamba", JAMBA, "text", "dt_proj"),
    "WavLM": ("WavLM", SPEECH, "audio", "q_proj k_proj v_proj out_proj"),
    "Wav2Vec2": ("Wav2Vec2", SPEECH, "audio", ""),
    "Funnel": ("Funnel", FUNNEL, "text", ""),
    "Swin": ("Swin", SWIN, "image", ""),
    "Siglip": ("SiglipVision", SIGLIP, "image", "out_proj"),
    "BERT": ("Bert", TEXT, "text", ""),
    "DeBERTa": ("Deberta", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p"]}, "text", "in_proj"),
    "BLOOM": ("Bloom", {"vocab_size": V, "hidden_size": D, "n_layer": 1, "n_head": 2}, "text", ""),
    "RWKV": ("Rwkv", {**TEXT, "num_hidden_layers": 2, "context_length": 32}, "text", "output value"),
    "Gemma3": ("Gemma3Text", {**GROUPED, "sliding_window": 8}, "text", ""),
    "GPT2": ("GPT2", GPT2, "text", ""),
}


def dense_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, sizes, *_ = KINDS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return model.eval().requires_grad_(False)


def output_of(model: nn.Module, inputs: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (1, 9), generator=generator)
    arguments = {
        "text": {"input_ids": ids},
        "both": {"input_ids": ids, "decoder_input_ids": ids},
        "audio": {"input_values": torch.randn(1, 700, generator=generator)},
        "image": {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)},
    }[inputs]
    output: torch.Tensor = model(**arguments).last_hidden_state
    return output


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_model_computes_the_same(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _, _, inputs, dense_names = KINDS[name]
    dense = dense_model(name)
    caplog.set_level(logging.INFO, "dbf_compile")
    options: Any = {"preset": "fast", "iterations": 5, "progress": False}
    model = dbf_compile.convert_(copy.deepcopy(dense), bits_per_weight=12.0, **options)
    # 12 bits and five iterations: some per cent a layer.
    assert error_of(output_of(model, inputs), output_of(dense, inputs)) < 0.25
    factored = {n for n, module in model.named_modules() if isinstance(module, DoubleBinaryLinear)}
    left = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert factored and {n.rpartition(".")[2] for n in left} >= set(dense_names.split())
    if left:
        (message,) = (record.message for record in caplog.records if record.name.startswith("dbf_compile"))
        assert f"{len(factored)} of " in message
        assert ("whose weight is used without a call in" in message) == bool(dense_names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5", "Gemma3"])
def test_it_compiles_without_graph_breaks_as_the_dense_one_does(name: str) -> None:
    _, _, inputs, _ = KINDS[name]
    options: Any = {"preset": "fast", "iterations": 5, "progress": False}
    model = dbf_compile.convert_(dense_model(name), bits_per_weight=12.0, **options)
    expected = output_of(model, inputs)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert error_of(output_of(compiled, inputs), expected) < 1e-5
