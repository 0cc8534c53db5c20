"""Tiny random models, and options with which factoring them takes a moment."""

import copy
from typing import Any

import torch
from torch import nn

import dbf_compile

# Few iterations: these tests are about the compiler, not about quality.
OPTIONS = {"bits_per_weight": 4.0, "iterations": 4, "progress": False}
# Two query heads share a key; 172 is no multiple of 32. Any token may follow any other.
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class MLP(nn.Module):
    """Two layers of odd sizes with a residual."""

    def __init__(self, features: int = 67, hidden: int = 130, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features, bias=False)
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def factored(model: nn.Module, **options: Any) -> nn.Module:
    """Return a copy of ``model`` whose layers are factored; it runs without the compiler."""
    return dbf_compile.convert_(copy.deepcopy(model), **{**OPTIONS, **options})


def tiny_llama(layers: int = 2, **sizes: Any) -> nn.Module:
    """Return the Llama that all tests share; ``sizes`` are fields of its configuration that have to differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": layers, **sizes})).eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=130, vocab_size=256
    )
    return BertModel(config).eval()


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error relative to the largest entry of ``expected``."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
