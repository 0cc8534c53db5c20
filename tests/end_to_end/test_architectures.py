"""Every kind of model: from a tiny random configuration, compressed, saved, loaded, compiled, compared."""

import pytest
import torch
from support.models import error_of

transformers = pytest.importorskip("transformers")

import dbf_compile  # noqa: E402
from dbf_compile.linear import DoubleBinaryLinear  # noqa: E402

V = 256
TEXT = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
SLIDING = {**GROUPED, "head_dim": 16, "sliding_window": 8}
SPEECH = {
    "vocab_size": V,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
IMAGES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# Class, configuration, factored layers, and the mode that is tried: blocks for most, since they depend on how a model
# calls them.
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, 14, "block"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, 14, "block"),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, 14, "independent"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING, 14, "block"),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT, 12, "block"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, 8, "independent"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": V, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        8,
        "block",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
        },
        12,
        "block",
    ),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, 13, "block"),
    # Many labels: the error of two logits is luck.
    "vit": ("ViTForImageClassification", "ViTConfig", {**IMAGES, "num_labels": 64}, 13, "block"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, 32, "block"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 4}, 24, "block"),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64},
        24,
        "independent",
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**SLIDING, "num_experts_per_tok": 2, "num_local_experts": 4},
        24,
        "independent",
    ),
}


def batches(name):
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        tokens = torch.randint(1, V, (1, 24), generator=generator)
        if name == "vit":
            yield {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}
        elif name == "whisper":
            features = torch.randn(1, 16, 64, generator=generator)
            yield {"input_features": features, "decoder_input_ids": tokens[:, :10]}
        else:
            yield {"input_ids": tokens}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_compressed_loaded_and_compiled(name, tmp_path):
    kind, config, sizes, layers, mode = KINDS[name]
    torch.manual_seed(0)
    dense = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    dense.save_pretrained(tmp_path / "dense")
    given = list(batches(name))
    options = {"bits": 4.0, "iterations": 20, "tune": 1, "refine": 1, "distill": 1, "progress": False}
    made = dbf_compile.compress(tmp_path / "dense", tmp_path / "made", batches=given, mode=mode, **options)
    assert made.report["coverage"]["share"] > 0.6
    model, info = type(dense).from_pretrained(made.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(isinstance(layer, DoubleBinaryLinear) for layer in model.modules()) == layers
    wanted, found = dense(**given[0]).logits, model(**given[0]).logits
    # Nearer to the dense model than a model that knows nothing: 1 would be the error of zeros.
    assert (found - wanted).norm() < 0.5 * (wanted - wanted.mean()).norm()
    compiled = torch.compile(model, backend="dbf")(**given[0]).logits
    assert error_of(compiled, found) < 1e-4  # float32 sums in another order


def test_experts_that_are_compressed_generate(tmp_path):
    kind, config, sizes, *_ = KINDS["mixtral"]
    torch.manual_seed(0)
    dense = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    dense.save_pretrained(tmp_path / "dense")
    made = dbf_compile.compress(
        tmp_path / "dense", tmp_path / "made", bits=4.0, iterations=3, progress=False, distill=0
    )
    model = type(dense).from_pretrained(made.folder)
    tokens = model.generate(next(batches("mixtral"))["input_ids"], max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 29)
