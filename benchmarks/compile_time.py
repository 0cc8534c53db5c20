"""Seconds until the first result: backend="dbf" with factors in the cache, against backend="inductor".

Every figure comes from a process of its own: "cold" with empty caches of Inductor, "warm" with those of the cold process.
Both backends take turns in every round. Factors and the C++ kernel are made once beforehand and timed apart.

    make bench
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

from measure import commit, minilm_folder, processor, versions, write_results

MODELS = ("minilm", "llama")
BACKENDS = ("inductor", "dbf")
STAGES = ("passes", "factors", "inductor", "kernel build")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(*arguments.worker)))
        return
    print(f"{processor()}; {versions()}; commit {commit()}; {arguments.rounds} rounds")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            rows += measure(model, arguments.rounds, Path(scratch))
    print(f"\nwritten to {write_results('compile_time', rows)}")


def measure(model: str, rounds: int, scratch: Path) -> list[dict]:
    """Measure a model; print and return one row per backend and state of the caches."""
    first = process(model, "dbf", scratch, scratch / "discarded")
    print(
        f"\n{model}: once per machine, building the C++ kernel {first['kernel build']:.1f} s; "
        f"once per weight, factoring {first['factors']:.1f} s"
    )
    results: dict[tuple[str, str], list[dict]] = {}
    for turn in range(rounds):
        for backend in BACKENDS:
            for state in ("cold", "warm"):
                result = process(model, backend, scratch, scratch / f"{model}-{backend}-{turn}")
                results.setdefault((state, backend), []).append(result)
    rows = []
    print(f"{'':6}{'backend':10}{'total':>8}{'ratio':>8}   " + "".join(f"{stage:>14}" for stage in STAGES))
    for state in ("cold", "warm"):
        base = statistics.median(item["total"] for item in results[state, "inductor"])
        for backend in BACKENDS:
            medians = {
                key: statistics.median(item[key] for item in results[state, backend])
                for key in ("total", *STAGES)
            }
            ratio = medians["total"] / base
            stages = "".join(f"{medians[stage]:14.2f}" for stage in STAGES)
            print(f"{state:6}{backend:10}{medians['total']:8.2f}{ratio:8.2f}   {stages}")
            row = {
                "model": model,
                "caches": state,
                "backend": backend,
                "rounds": rounds,
                "ratio": round(ratio, 3),
            }
            rows.append({**row, **{key: round(value, 3) for key, value in medians.items()}})
    return rows


def process(model: str, backend: str, scratch: Path, inductor_cache: Path) -> dict:
    environment = {
        **os.environ,
        "DBF_CACHE_DIR": str(scratch / "dbf"),
        "TORCHINDUCTOR_CACHE_DIR": str(inductor_cache),
    }
    command = [sys.executable, __file__, "--worker", model, backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own ----------------------------------------------------------------------------------------


def work(model_name: str, backend: str) -> dict[str, float]:
    """Return the seconds of the first call of a freshly compiled model, and of the stages within it."""
    import torch

    import dbf_compile.compiler.backend
    from dbf_compile.compiler import inductor
    from dbf_compile.compression.layers import LayerFactorizer
    from dbf_compile.kernels import cpp_build

    model, tokens = MAKE[model_name]()
    spent = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, owner: object, name: str) -> None:
        function = getattr(owner, name)

        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += time.perf_counter() - start

        setattr(owner, name, run)

    timed("passes", dbf_compile.compiler.backend, "run_pipeline")
    timed("factors", LayerFactorizer, "make")
    timed("kernel build", cpp_build, "build")
    options = {"iterations": 20, "progress": False}  # quality does not matter here
    if backend == "dbf":
        timed("inductor", inductor, "compile_graph")
        run = torch.compile(model, backend="dbf", fullgraph=True, options=options)
    else:
        import torch._inductor.compile_fx as compile_fx

        timed("inductor", compile_fx, "compile_fx")
        run = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        start = time.perf_counter()
        run(tokens)
        total = time.perf_counter() - start
    spent["passes"] -= spent["factors"]
    return {"total": total, **spent}


def make_minilm():
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_folder()).eval(), torch.randint(1000, 2000, (4, 32))


def make_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(1, 1000, (1, 16))


MAKE = {"minilm": make_minilm, "llama": make_llama}


if __name__ == "__main__":
    main()
