"""How mode "independent" scales over processes: 1, 2 and 4, each on one core, as so many machines of one core.

    python benchmarks/compress_scaling.py                     a quarter of an hour on two idle cores
    python benchmarks/compress_scaling.py --rounds 1 --processes 1 2 --iterations 5

Every process calls ``compress`` with the same arguments, and they meet in the work folder alone. Process i has core i; where
there are fewer cores they share them, which shows what sharing costs and no gain. The model has random weights and the shapes of
SmolLM2-135M, with fewer blocks. Counts of processes take turns, and medians are written. ``seconds`` are from start to end,
``factor_seconds`` those of factoring; ``cpu_seconds`` is the processor time of all processes, which other programs on the
machine hardly change. All of them write the same files, or the program stops.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import write_results

from dbf_compile.machine import cores

SMOLLM2 = {
    "vocab_size": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
WORKER = """
import json, os, sys
core, model, output, options = json.loads(sys.argv[1])
os.sched_setaffinity(0, [core])
import dbf_compile
dbf_compile.compress(model, output, mode="independent", own_text=0, progress=False, workers=1, **options)
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(num_hidden_layers=arguments.blocks, **SMOLLM2)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
        options = {"bits": 2.0, "iterations": arguments.iterations}
        runs: dict[int, list[dict[str, Any]]] = {count: [] for count in arguments.processes}
        files = set()
        for number in range(arguments.rounds):
            for count in arguments.processes:
                output = folder / f"{number}-{count}"
                runs[count].append(run(folder / "dense", output, count, options))
                files.add(hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest())
                print(count, runs[count][-1], flush=True)
    if len(files) != 1:
        raise SystemExit("the files differ")
    rows = table(runs, arguments)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(write_results("compress_scaling", rows))


def run(model: Path, output: Path, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of one compression by ``count`` processes, and the processor time of all of them."""
    places = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", WORKER),
                json.dumps([places[i % len(places)], str(model), str(output), options]),
            ],
            env=environment,
        )
        for i in range(count)
    ]
    used = 0.0
    for worker in workers:
        _, status, usage = os.wait4(worker.pid, 0)
        worker.returncode = os.waitstatus_to_exitcode(status)
        if worker.returncode:
            raise SystemExit(f"a worker ended with {worker.returncode}")
        used += usage.ru_utime + usage.ru_stime
    report = json.loads((output / "dbf_report.json").read_text())
    return {
        "seconds": time.perf_counter() - began,
        "factor_seconds": report["time"]["factor"],
        "cpu_seconds": used,
    }


def table(runs: dict[int, list[dict[str, Any]]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of medians for each count of processes; ratios are of medians, against the first count."""
    medians = {count: _medians(results) for count, results in runs.items()}
    first = medians[arguments.processes[0]]
    return [
        {
            "processes": count,
            "cores": min(count, cores()),
            "blocks": arguments.blocks,
            "iterations": arguments.iterations,
            "rounds": arguments.rounds,
            **{name: round(value, 2) for name, value in row.items()},
            "speedup": round(first["seconds"] / row["seconds"], 3),
            "factor_speedup": round(first["factor_seconds"] / row["factor_seconds"], 3),
            "cpu_ratio": round(row["cpu_seconds"] / first["cpu_seconds"], 3),
        }
        for count, row in medians.items()
    ]


def _medians(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


if __name__ == "__main__":
    main()
