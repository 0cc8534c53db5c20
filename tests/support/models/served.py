"""Folders of random factors that an engine serves: every kind of layer, and sizes that two ranks can share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.models.architectures import SHARPER
from support.models.pretrained import tiny_tokenizer
from support.models.tiny import LLAMA
from support.strategies import random_factors_like
from torch import Tensor

from dbf_compile.integrations.experts import linearize_experts_
from dbf_compile.linear import dense_linears, dense_weight, swap_
from dbf_compile.tables import quantize_tables, swap_tables_

# Heads of 64: vLLM's attention on CPUs knows none below 32. Of 688 columns a rank of two has 344, no multiple of 32; 300 rows
# of a vocabulary are padded. Two query heads share a key.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Kind of a folder: layers that stay dense, whether siblings share their first stage, sizes of the model, tables.
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"sharing": True, "dense": ("lm_head",)},
    "own": {"sizes": {"attention_bias": True, "mlp_bias": True}},
    "mixed": {
        "dense": ("k_proj", "up_proj", "layers.1.self_attn.o_proj"),
        "sharing": True,
        "tables": {"model.embed_tokens": "int8"},
    },
    "tables": {
        "tables": {"model.embed_tokens": "int8", "lm_head": "int8"},
        "sizes": {"tie_word_embeddings": True},
    },
    "experts": {
        "model": "Qwen3Moe",
        "sizes": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80},
    },
    "phi3": {"model": "Phi3", "sizes": {"pad_token_id": 0}},
}
ADAPTED = "base_model.model."  # what PEFT puts before a layer's name
MID_FEATURES = (150, 65, 192)  # odd, or no multiple of 32


def served_model(kind: str) -> Any:
    """Return a model of one kind of layers, in float32."""
    settings = KINDS[kind]
    model = _dense(settings.get("model", "Llama"), {**LLAMA, **SIZES, **settings.get("sizes", {})})
    linearize_experts_(model)
    tables = settings.get("tables", {})
    left = (*settings.get("dense", ()), *tables)
    layers = {key: layer for key, layer in dense_linears(model).items() if not key.endswith(left)}
    for bias in (layer.bias for layer in layers.values() if layer.bias is not None):
        torch.nn.init.normal_(bias, std=0.1)
    factors = {}
    for index, names in enumerate(_groups(list(layers), settings.get("sharing", False))):
        weights = [dense_weight(layers[name]).detach() for name in names]
        weight = torch.cat(weights)
        split = random_factors_like(weight, MID_FEATURES[index % 3], seed=index).split(
            [len(w) for w in weights]
        )
        factors |= dict(zip(names, split, strict=True))
    model = swap_(model, factors)
    for key in factors:
        if key.endswith(("q_proj", "k_proj")):
            model.get_submodule(key).scale_out.mul_(SHARPER)
    return swap_tables_(model, quantize_tables(model, tables)).requires_grad_(False)


def served_folder(place: Path, kind: str) -> Path:
    """Write the folder of a kind, with a tokenizer of bytes; return it."""
    folder = place / kind
    served_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts(count: int = 8, longest: int = 40) -> list[list[int]]:
    """Return token ids of texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(3, longest, count).long().tolist()
    return [torch.randint(1, 256, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy(
    folder: Path, texts: Sequence[Sequence[int]], tokens: int, adapter: Mapping[str, Tensor] | None = None
) -> list[list[int]]:
    """Return what transformers continues each text with, in float32, with an adapter's products added if there is one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, down in (adapter or {}).items():
        layer, _, kind = name.removeprefix(ADAPTED).rpartition(".lora_")
        if kind == "A.weight":
            up = adapter[name.replace("lora_A", "lora_B")]
            model.get_submodule(layer).register_forward_hook(
                lambda _, inputs, y, down=down, up=up: y + inputs[0] @ down.T @ up.T
            )
    results = []
    for text in texts:
        ids: Tensor = model.generate(
            torch.tensor([text]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        results.append(ids[0, len(text) :].tolist())
    return results


def write_adapter(folder: Path, layers: Mapping[str, tuple[int, int]], rank: int = 4) -> dict[str, Tensor]:
    """Write a LoRA adapter of random matrices as PEFT does; return its tensors.

    Args:
        folder: to be made.
        layers: name to rows and columns.
        rank: of its matrices; its products are added as they are.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, columns) in layers.items():
        tensors[f"{ADAPTED}{name}.lora_A.weight"] = (
            torch.randn(rank, columns, generator=generator) / columns**0.5
        )
        tensors[f"{ADAPTED}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in layers})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def _dense(name: str, sizes: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _groups(names: Sequence[str], sharing: bool) -> list[list[str]]:
    """Return which layers are factored as one: siblings of one parent, or each alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        siblings = next((each for each in SIBLINGS if own in each), None) if sharing else None
        groups.setdefault((parent, *(siblings or (own,))), []).append(name)
    return list(groups.values())
