"""Tiny Llamas as GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from support.models.tiny import tiny_llama
from torch import Tensor

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path, kind: str = "F16", tied: bool = True, bos: bool = False, **options: Any) -> Any:
    """Write a tiny Llama with a vocabulary of bytes, and return the model whose weights were written.

    Args:
        path: the file.
        kind: type of matrices.
        tied: write no head.
        bos: texts begin with token 1.
        **options: ``entries``: more metadata; ``tensors``: more tensors; ``without``: names of tensors left out.
    """
    model = tiny_llama(tie_word_embeddings=tied, intermediate_size=160)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, config.vocab_size, bos)
    for key, value in options.get("entries", {}).items():
        getattr(writer, f"add_{_KINDS[type(value)]}")(key, value)
    tensors = {**_tensors(model), **options.get("tensors", {})}
    for name, tensor in tensors.items():
        if name not in options.get("without", ()):
            _add(writer, name, tensor, Kind[kind] if tensor.dim() > 1 else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


_KINDS = {str: "string", int: "uint32", float: "float32", bool: "bool"}


def _add(writer: Any, name: str, tensor: Tensor, kind: Kind) -> None:
    data = gguf.quantize(np.ascontiguousarray(tensor.float().numpy()), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def _add_vocabulary(writer: Any, size: int, bos: bool) -> None:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 5]
    words = ["<unk>", "<s>", "</s>", "<end>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 4 + [1] * (size - 4))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return a Llama's tensors by llama.cpp's names, queries and keys in the order of its rotations."""
    config = model.config
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        for theirs, ours in names.items():
            weight = layer.get_submodule(theirs).weight
            if ours in heads:
                weight = _rotated(weight, heads[ours])
            tensors[f"blk.{index}.{ours}.weight"] = weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _rotated(weight: Tensor, heads: int) -> Tensor:
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope_factors(model: Any, factor: float, low: float = 1.0, high: float = 4.0) -> Tensor:
    """Return the factors of frequencies that llama.cpp writes for a Llama of version 3.1 and later."""
    size = model.config.hidden_size // model.config.num_attention_heads
    waves = 2 * torch.pi * 10000.0 ** (torch.arange(0, size, 2) / size)
    smooth = (8192 / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(waves < 8192 / high, 1.0, torch.where(waves > 8192 / low, factor, between))
