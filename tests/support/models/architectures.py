"""Every kind of model, tiny: what the tests of whole models go through."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from support.models.tiny import LLAMA
from support.strategies import random_factors_like

from dbf_compile.linear import DoubleBinaryLinear, dense_linears, dense_weight, replace_everywhere

V = 256
BLOCKS = 2
COUNTS_OF_BLOCKS = ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers")
TEXT = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
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
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
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
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# Class, configuration, number of factored layers, and the mode that is tried: "block" for most, since it depends on how
# a model calls its blocks.
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, 14, "block"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, 14, "block"),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, 14, "independent"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING, 14, "block"),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT, 12, "block"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, 8, "independent"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": V, "n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
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


# Factor of random queries and keys. Without it attention is almost uniform, and a wrong query would hardly be seen.
SHARPER = 4.0


def random_model(name: str, blocks: int = BLOCKS) -> torch.nn.Module:
    """Return a dense model, random but always the same, with so many blocks (of each kind)."""
    import transformers

    kind, config, sizes, *_ = KINDS[name]
    sizes = {**sizes, **{key: blocks for key in sizes if key in COUNTS_OF_BLOCKS}}
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


@torch.no_grad()
def random_factored_model(name: str, blocks: int = BLOCKS) -> torch.nn.Module:
    """Return a model of so many blocks whose layers have random factors, all but the head.

    Middle dimensions are odd, or wider than one program of the GPU's kernel sums.
    """
    model = random_model(name, blocks)
    layers = dense_linears(model)
    head = model.get_output_embeddings()
    layers = {key: layer for key, layer in layers.items() if layer is not head}
    for index, (key, layer) in enumerate(layers.items()):
        factors = random_factors_like(dense_weight(layer), (40, 1090, 33)[index % 3], seed=index)
        replacement = DoubleBinaryLinear(factors, layer.bias)
        if key.endswith(("q_proj", "k_proj", "query", "key")):
            replacement.scale_out *= SHARPER
        replace_everywhere(model, layer, replacement)
    return model


def settings_of(name: str) -> dict[str, bool]:
    """Return the arguments of a call, beside the batch, that switch the cache off."""
    return {} if name in ("bert", "vit") else {"use_cache": False}


def batches(name: str, tokens: int = 24) -> Iterator[dict[str, torch.Tensor]]:
    """Yield six batches of one sequence, or picture."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        ids = torch.randint(1, V, (1, tokens), generator=generator)
        if name == "vit":
            yield {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}
        elif name == "whisper":
            features = torch.randn(1, 16, 64, generator=generator)
            yield {"input_features": features, "decoder_input_ids": ids[:, :10]}
        else:
            yield {"input_ids": ids}
