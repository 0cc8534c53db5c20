"""A whole Llama with random weights on the CPU: tokens per second of prefill and decode, memory, time to load.

A process of its own reads every variant from a checkpoint; variants take turns. The memory of a model is the growth of the
resident memory, after a tiny model of the same kind has loaded all libraries. Rows of the embedding that no token has read
are still in the file and do not count. The size of the weights is that of all tensors. Decoding is greedy with a static
cache, one token at a time, as `generate` does it: prefill eager, decoding compiled. dbf keeps embeddings dense in
bfloat16; "+ head" factors the output head as well.

    python benchmarks/decode_cpu.py                          all models and variants
    python benchmarks/decode_cpu.py --models llama-3.2-1b --variants "bf16 inductor" "dbf 2 bit"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import commit, processor, versions, write_results

MODELS = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llama-2-7b, 4 layers": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
VARIANTS = ("bf16 eager", "bf16 inductor", "dbf 2 bit", "dbf 1 bit", "dbf 2 bit + head", "dbf 1 bit + head")
MEASURES = (
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "weights_mb",
    "model_mb",
    "process_mb",
    "load_s",
    "compile_s",
)
DENSE, FACTORS = "dense.safetensors", "factors.safetensors"
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--profile", action="store_true", help="print the operators that take most of the time of decoding"
    )
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--writer", nargs=3, metavar=("MODEL", "VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(*arguments.worker, arguments)))
        return
    if arguments.writer:
        model, variant, folder = arguments.writer
        write(MODELS[model], variant, Path(folder))
        return
    print(f"{processor()}, {arguments.threads} threads; {versions()}; commit {commit()}")
    rows = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(model, Path(folder), arguments)
    print(f"\nwritten to {write_results('cpu_decode', rows)}")


def measure(model: str, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    results: dict[str, list[dict]] = {}
    for variant in arguments.variants:
        checkpoint = folder / variant
        checkpoint.mkdir()
        process("--writer", model, variant, checkpoint, arguments)
        # Not counted: fills the cache of Inductor and the page cache.
        process("--worker", model, variant, checkpoint, arguments)
    for _ in range(arguments.rounds):
        for variant in arguments.variants:
            printed = process("--worker", model, variant, folder / variant, arguments)
            results.setdefault(variant, []).append(json.loads(printed.splitlines()[-1]))
    print(f"\n{model}, prompt of {arguments.prompt}, {arguments.new} new tokens")
    print(f"{'':20}" + "".join(f"{name:>22}" for name in MEASURES))
    medians = {
        variant: {name: statistics.median(run[name] for run in runs) for name in MEASURES}
        for variant, runs in results.items()
    }
    base = medians.get("bf16 inductor")
    rows = []
    for variant, values in medians.items():
        cells = []
        for name in MEASURES:
            ratio = f" ({values[name] / base[name]:.2f}x)" if base else ""
            cells.append(f"{values[name]:.1f}{ratio}")
        print(f"{variant:20}" + "".join(f"{cell:>22}" for cell in cells))
        rows.append(
            {
                "model": model,
                "variant": variant,
                "threads": arguments.threads,
                "prompt": arguments.prompt,
                "new": arguments.new,
                "rounds": arguments.rounds,
                **{name: round(value, 2) for name, value in values.items()},
            }
        )
        for line in results[variant][-1].get("profile", []):
            print("    " + line)
    return rows


def process(role: str, model: str, variant: str, checkpoint: Path, arguments: argparse.Namespace) -> str:
    command = [sys.executable, __file__, role, model, variant, str(checkpoint)]
    command += ["--threads", str(arguments.threads)]
    command += ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
    command += ["--profile"] if arguments.profile else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


# --- in a process of its own ----------------------------------------------------------------------------------------


def work(model_name: str, variant: str, folder: str, arguments: argparse.Namespace) -> dict:
    import gc

    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tiny:
        write(TINY, variant, Path(tiny))
        run(TINY, variant, Path(tiny), 8, 4, profile=False)
    torch.compiler.reset()
    gc.collect()
    before = resident_mb()
    result = run(
        MODELS[model_name], variant, Path(folder), arguments.prompt, arguments.new, arguments.profile
    )
    return {**result, "model_mb": result["process_mb"] - before}


def run(sizes: dict, variant: str, folder: Path, prompt_length: int, new: int, profile: bool) -> dict:
    """Read a model; return the speed and the memory of prefill and decoding."""
    import torch
    from transformers import StaticCache

    start = time.perf_counter()
    model = read(sizes, variant, folder)
    load = time.perf_counter() - start

    step = model.forward
    if not variant.endswith("eager"):
        backend = "inductor" if variant.startswith("bf16") else "dbf"
        step = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=prompt_length + new + 8)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_length))
    with torch.inference_mode():

        def prefill() -> torch.Tensor:
            cache.reset()
            positions = torch.arange(prompt_length)[None]
            out = model(prompt, past_key_values=cache, position_ids=positions, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1)[:, None]

        def decode(token: torch.Tensor, position: int) -> torch.Tensor:
            positions = torch.tensor([[position]])
            return (
                step(token, past_key_values=cache, position_ids=positions).logits[:, -1].argmax(-1)[:, None]
            )

        prefill()
        start = time.perf_counter()
        token = prefill()
        prefill_seconds = time.perf_counter() - start
        start = time.perf_counter()
        token = decode(token, prompt_length)
        compile_seconds = time.perf_counter() - start
        token = decode(token, prompt_length + 1)
        times = []
        for index in range(2, new):
            start = time.perf_counter()
            token = decode(token, prompt_length + index)
            times.append(time.perf_counter() - start)
        lines: list[str] = []
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
                for _ in range(8):
                    decode(token, prompt_length + 1)
            table = trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
            lines = [line[:110] for line in table.splitlines()]
    return {
        "decode_tokens_per_s": 1 / statistics.median(times),
        "prefill_tokens_per_s": prompt_length / prefill_seconds,
        "weights_mb": weights_mb(model),
        "process_mb": resident_mb(),
        "load_s": load,
        "compile_s": compile_seconds,
        "profile": lines,
    }


def write(sizes: dict, variant: str, folder: Path) -> None:
    """Write a checkpoint of random weights; the variant decides which layers are factored."""
    import torch
    from safetensors.torch import save_file

    import dbf_compile

    torch.manual_seed(0)
    model = meta_model(sizes)
    factored = factored_layers(model, variant)
    if factored:
        bits = float(variant.split()[1])
        dbf_compile.save(
            {name: random_factors(layer, bits) for name, layer in factored.items()}, folder / FACTORS
        )
    dense = {
        name: torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02)
        for name, parameter in model.named_parameters()  # tied ones appear once
        if name.rpartition(".")[0] not in factored
    }
    save_file(dense, folder / DENSE)


def read(sizes: dict, variant: str, folder: Path):
    """Return the model of a checkpoint; dense weights stay mapped from the file, as transformers maps them."""
    import torch
    from safetensors.torch import load_file

    import dbf_compile

    model = meta_model(sizes)
    if factored_layers(model, variant):
        for name, factors in dbf_compile.load(folder / FACTORS).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dbf_compile.DoubleBinaryLinear(factors))
    model.load_state_dict(load_file(folder / DENSE), strict=False, assign=True)
    if isinstance(model.lm_head, torch.nn.Linear):
        model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)
    return model.eval().requires_grad_(False)


def meta_model(sizes: dict):
    """Return a model on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, max_position_embeddings=2048, dtype=torch.bfloat16)
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def factored_layers(model, variant: str) -> dict:
    """Return the layers that a variant factors, by name."""
    import torch

    return {
        name: layer
        for name, layer in model.named_modules()
        if variant.startswith("dbf")
        and isinstance(layer, torch.nn.Linear)
        and (name != "lm_head" or variant.endswith("+ head"))
    }


def random_factors(layer, bits: float):
    """Return random factors of a layer at ``bits`` per weight."""
    import torch

    from dbf_compile import DoubleBinaryFactors
    from dbf_compile.factors import mid_features_for
    from dbf_compile.signs import pack_signs

    K, N = layer.in_features, layer.out_features
    R = mid_features_for(bits, K, N)
    R = R // 32 * 32 or R  # whole words, as `compress` chooses
    signs = [
        # Rows of whole words are random words; others are packed, for bits behind the last column are zero.
        torch.randint(-(2**31), 2**31, (rows, columns // 32), dtype=torch.int32)
        if columns % 32 == 0
        else pack_signs(torch.randint(0, 2, (rows, columns), dtype=torch.int8) * 2 - 1)
        for rows, columns in ((R, K), (N, R))
    ]
    size = (1 / (K * R) ** 0.5) ** 0.5
    scales = [torch.full((count,), size).half() for count in (K, R, N)]
    return DoubleBinaryFactors(*signs, *scales)


def weights_mb(model) -> float:
    """Return the size of all parameters and buffers in 10^6 bytes; tied ones count once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def resident_mb() -> float:
    """Return the resident memory of this process in 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("no VmRSS in /proc/self/status")


if __name__ == "__main__":
    main()
