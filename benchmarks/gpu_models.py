"""Whole models with random weights on one NVIDIA GPU, for bench_gpu: sizes, layers, speed of decoding."""

from __future__ import annotations

import gc
import statistics
import time

import torch
from decode_cpu import MODELS as SIZES
from decode_cpu import factored_layers, meta_model, random_factors
from gpu_timing import DEVICE, DRY_RUN, synchronize
from torch import Tensor, nn

from dbf_compile import DoubleBinaryFactors, DoubleBinaryLinear
from dbf_compile.compiler import inductor

_QWEN3 = SIZES["qwen3-0.6b"]
_LLAMA2 = {**SIZES["llama-2-7b, 4 layers"], "num_hidden_layers": 32}
# All are built as Llamas of these sizes; a real Qwen3 also normalizes queries and keys.
MODELS = {
    "llama-2-7b": _LLAMA2,
    "llama-3-8b": {
        **_LLAMA2,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-0.6b": _QWEN3,
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
SMALL_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
DEFAULT_VARIANTS = ("bf16 inductor", "dbf 1 bit", "dbf 1.5 bit", "dbf 2 bit")
# "combined": Inductor's experimental combo_kernels, which launch independent operations together.
VARIANTS = (*DEFAULT_VARIANTS, "dbf 1 bit, combined", "dbf 2 bit, combined", "bf16 inductor, combined")


def layers(model: str) -> dict[str, tuple[int, int]]:
    """Return rows and columns of a block's layers; layers that read the same input count as one."""
    sizes = MODELS[model]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head = sizes.get("head_dim", hidden // heads)
    return {
        "qkv": ((heads + 2 * shared) * head, hidden),
        "o": (hidden, heads * head),
        "gate and up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def shapes() -> dict[str, list[str]]:
    """Return which layers have which shape: "rows x columns" to their names."""
    names: dict[str, list[str]] = {}
    for model in MODELS:
        for layer, (N, K) in layers(model).items():
            names.setdefault(f"{N}x{K}", []).append(f"{model} {layer}")
    return names


def random_device_factors(N: int, K: int, bits: float) -> DoubleBinaryFactors:
    """Return random factors of a layer of N rows and K columns, on the device."""
    with torch.device(DEVICE):
        return random_factors(nn.Linear(K, N, device="meta"), bits)


def time_model(name: str, variant: str, new: int) -> dict:
    """Return the speed and the memory of decoding with a model of random weights."""
    from transformers import StaticCache

    torch.compiler.reset()
    gc.collect()  # frees the previous model, which has reference cycles
    if not DRY_RUN:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = random_model(SMALL_MODEL if DRY_RUN else MODELS[name], variant)
    weights = torch.cuda.memory_allocated() - before
    step = torch.compile(model, fullgraph=True, dynamic=False, **compile_settings(variant))
    prompt, repeats = 128, 5
    cache = StaticCache(config=model.config, max_cache_len=prompt + 4 + repeats * new)
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt), device=DEVICE)
    places = [torch.full((1, 1), place, device=DEVICE) for place in range(prompt + 4 + repeats * new)]
    with torch.inference_mode():
        positions = torch.cat(places[:prompt], dim=1)
        logits = model(tokens, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)

        def decode(token: Tensor, first: int, count: int) -> Tensor:
            for place in places[first : first + count]:
                logits = step(token, past_key_values=cache, position_ids=place).logits
                token = logits[:, -1:].argmax(-1)
            synchronize()
            return token

        start = time.perf_counter()
        token = decode(token, prompt, 4)  # compiles and records the graph
        compile_seconds = time.perf_counter() - start
        times = []
        for index in range(repeats):
            start = time.perf_counter()
            token = decode(token, prompt + 4 + index * new, new)
            times.append((time.perf_counter() - start) / new)
    row = {
        "model": name,
        "variant": variant,
        "tokens_per_s": round(1 / statistics.median(times), 1),
        "weights_mb": round(weights / 1e6),
        "peak_mb": round((torch.cuda.max_memory_allocated() - before) / 1e6),
        "compile_s": round(compile_seconds, 1),
        "new": new,
    }
    print(row, flush=True)
    return row


def compile_settings(variant: str) -> dict:
    """Return the arguments of ``torch.compile``, which takes either a mode or options."""
    combined = {"combo_kernels": variant.endswith(", combined")}
    if variant.startswith("dbf"):
        return {"backend": "dbf", "options": {"mode": "reduce-overhead", "inductor": combined}}
    return {"options": {**inductor.mode_settings("reduce-overhead"), **combined}}


def random_model(sizes: dict, variant: str) -> nn.Module:
    """Return a Llama of random weights on the device; the variant decides which layers are factored."""
    model = meta_model(sizes)
    # Layers that read the same input are factored as one, and share their first stage.
    together: dict[str, list[str]] = {}
    for name in factored_layers(model, variant):
        parent, _, child = name.rpartition(".")
        group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
        together.setdefault(f"{parent}.{group.get(child, child)}", []).append(name)
    for names in together.values():
        layers = [model.get_submodule(name) for name in names]
        rows = [layer.out_features for layer in layers]
        stacked = random_device_factors(sum(rows), layers[0].in_features, float(variant.split()[1]))
        for name, factors in zip(names, stacked.split(rows), strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DoubleBinaryLinear(factors))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE).normal_(std=0.02)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    model.tie_weights()
    rotary = model.model.rotary_emb
    with torch.device(DEVICE):
        model.model.rotary_emb = type(rotary)(model.config)
    return model.eval().requires_grad_(False)
