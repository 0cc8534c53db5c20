"""SmolLM2-135M at 2 bits in vLLM beside itself in bfloat16: tokens a second, memory of weights, start, 200 requests at once.

Each variant has a process of its own, one runs at a time, and they take turns. A process counts its processor time, too: on a
machine that others use only that can be compared. Answers to requests over HTTP are compared with those of an engine that is
asked one by one, in float32.

    make test-vllm                                               makes the environment .vllm
    .vllm/bin/python benchmarks/bench_vllm.py                    the folders of make bench-laptop; half an hour
    .vllm/bin/python benchmarks/bench_vllm.py --rounds 1 --modes eager --parts batches
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from laptop_worker import resident_mb
from measure import RESULTS, commit, processor, versions, write_results

MODEL = RESULTS.parents[1] / "out/laptop/smollm2-135m"
VARIANTS = {"bfloat16": "dense", "dbf, 2 bits": "dbf-2-bit"}
CASES = {
    "batch of 8": (8, 32, 64),
    "one": (1, 32, 32),
    "prefill of 1,024": (1, 1024, 1),
}  # texts, length, new tokens
LENGTH, REQUESTS, NEW = 2048, 200, 8
TIMES = ("seconds", "cpu_seconds")
PARTS = ("batches", "start", "requests")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder that holds 'dense' and 'dbf-2-bit'")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(arguments.threads),
    }
    print(f"{processor()}; {versions()}; commit {commit()}; load {os.getloadavg()[0]:.1f}", flush=True)
    rows: list[dict[str, Any]] = []
    for mode in arguments.modes:
        if "batches" in arguments.parts:
            rows += batches(arguments, mode)
        if "start" in arguments.parts:
            rows += starts(arguments, mode)
    if "requests" in arguments.parts:
        rows.append(requests(arguments.model / VARIANTS["dbf, 2 bits"]))
    common = {"threads": arguments.threads, "load": f"{os.getloadavg()[0]:.1f}"}
    print(write_results("vllm", [{**row, **common} for row in rows]))


def row(
    mode: str, variant: str, what: str, unit: str, values: Sequence[float], cpu: Sequence[float] = ()
) -> dict[str, Any]:
    """Return a row of results, and print it: medians, of wall time and of processor time."""
    result = {
        "mode": mode,
        "variant": variant,
        "case": what,
        "unit": unit,
        "value": f"{statistics.median(values):.4g}",
    }
    result["by_cpu_time"] = f"{statistics.median(cpu):.4g}" if cpu else ""
    print(*result.values(), flush=True)
    return result


class Worker:
    """An engine in a process of its own, which answers lines of JSON."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--worker", str(folder), json.dumps(settings)]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready: dict[str, Any] = self._answer()

    def ask(self, **case: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def settings_of(mode: str) -> dict[str, Any]:
    return {"dtype": "bfloat16", "enforce_eager": mode == "eager", "max_num_seqs": 8}


def batches(arguments: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    """Return tokens a second of every case, and the memory of weights."""
    workers = {name: Worker(arguments.model / folder, settings_of(mode)) for name, folder in VARIANTS.items()}
    rows = [
        row(mode, name, "weights", "MB", [worker.ready["weights_mb"]]) for name, worker in workers.items()
    ]
    residents: dict[str, float] = {}
    for what, (texts, length, new) in CASES.items():
        samples: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in workers}
        for number in range(-1, arguments.rounds):
            for name, worker in workers.items():
                answers = [
                    worker.ask(texts=texts, length=length, new=count, seed=number)
                    for count in sorted({1, new})
                ]
                if number >= 0:
                    samples[name].append(answers)
        tokens = texts * (new if new > 1 else length)
        for name, rounds in samples.items():
            rates = [[tokens / answers[-1][key] for answers in rounds] for key in TIMES]
            rows.append(row(mode, name, what, "tokens/s", *rates))
            if new > 1:  # the first token comes with the prompts
                rest = texts * (new - 1)
                rates = [[rest / (whole[key] - first[key]) for first, whole in rounds] for key in TIMES]
                rows.append(row(mode, name, f"{what}, without the prompts", "tokens/s", *rates))
            residents[name] = rounds[-1][-1]["resident_mb"]
    rows += [row(mode, name, "resident", "MB", [size]) for name, size in residents.items()]
    for worker in workers.values():
        worker.close()
    return rows


def starts(arguments: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    """Return seconds from the start of a process to the first token, caches warm: those of files and of compiled code."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for number in range(-1, min(arguments.rounds, 3)):
        for name, folder in VARIANTS.items():
            began = time.time()
            worker = Worker(arguments.model / folder, settings_of(mode))
            worker.ask(texts=1, length=8, new=1, seed=0)
            wall = time.time() - began
            if number >= 0:
                samples[name].append((wall, worker.ask(texts=0)["process_seconds"]))
            worker.close()
    return [
        row(mode, name, "start", "s", [wall for wall, _ in each], [cpu for _, cpu in each])
        for name, each in samples.items()
    ]


def requests(folder: Path) -> dict[str, Any]:
    """Return how many of many requests at once were answered as when they are asked one by one."""
    import openai

    worker = Worker(folder, {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 1})
    expected = worker.ask(texts=REQUESTS, length=24, new=NEW, seed=0)["tokens"]
    worker.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    sizes = ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", "64"]
    process = subprocess.Popen(
        [*command, *options, *sizes], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600)

        def ask(text: list[int]) -> list[int]:
            body = {"ignore_eos": True, "return_token_ids": True}
            result: Any = client.completions.create(
                model="model", prompt=text, temperature=0, max_tokens=NEW, extra_body=body
            )
            return list(result.choices[0].token_ids)

        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = list(pool.map(ask, texts_of(REQUESTS, 24, 0)))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    same = sum(answer == tokens for answer, tokens in zip(answers, expected, strict=True))
    return row(
        "eager",
        "dbf, 2 bits, float32",
        f"{REQUESTS} requests at once, answered as one by one",
        "requests",
        [same],
    )


def texts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Return random token ids; no two texts begin alike."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 40_000) for _ in range(length)] for _ in range(count)]


def work(folder: str, settings: dict[str, Any]) -> None:
    """Answer lines of JSON with times and tokens, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with answers
    import torch
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        max_model_len=LENGTH,
        max_num_batched_tokens=LENGTH,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **settings,
    )

    def held(module: torch.nn.Module) -> int:
        named = [*module.named_parameters(), *module.named_buffers()]
        return sum({id(one): one.nbytes for name, one in named if "rotary" not in name}.values())

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    # Dense weights lie where no one can ask for them, packed by oneDNN: they take what they take in the folder, or more.
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    answer(weights_mb=max(model.apply_model(held)[0], stored) / 1e6)
    for line in sys.stdin:
        case = json.loads(line)
        if not case["texts"]:
            answer(process_seconds=time.process_time())
            continue
        asked = [{"prompt_token_ids": text} for text in texts_of(case["texts"], case["length"], case["seed"])]
        greedy = SamplingParams(temperature=0, max_tokens=case["new"], ignore_eos=True)
        wall, cpu = time.perf_counter(), time.process_time()
        results = model.generate(asked, greedy, use_tqdm=False)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        tokens = [list(result.outputs[0].token_ids) for result in results]
        answer(seconds=seconds, cpu_seconds=cpu_seconds, tokens=tokens, resident_mb=resident_mb())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
