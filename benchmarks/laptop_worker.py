"""One variant of one model in a process of its own: it waits for a case on its input, runs it, and answers with times.

python benchmarks/laptop_worker.py MODEL VARIANT PATH THREADS           cases as lines of JSON, until the input ends
python benchmarks/laptop_worker.py MODEL VARIANT PATH THREADS --start   one token, and the time of day at which it came
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PROMPT_OF_A_START = 32


def main() -> None:
    variant, path, threads = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    runner = Llama(path, threads) if variant.startswith("llama.cpp") else Torch(path, threads)
    if sys.argv[5:] == ["--start"]:
        runner.run(1, PROMPT_OF_A_START, 1)
        answer({"first_token_at": time.time()})
        return
    answer({"ready": True})
    for line in sys.stdin:
        case = json.loads(line)
        prefill, decode = runner.run(case["batch"], case["prompt"], case["new"])
        answer({"prefill_s": prefill, "decode_s": decode, "resident_mb": resident_mb()})


def answer(values: dict[str, Any]) -> None:
    _ANSWERS.write(json.dumps(values) + "\n")
    _ANSWERS.flush()


class Torch:
    """A folder of transformers, compressed or dense, run as a user does."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        from dbf_compile.generation import TextGenerator

        torch.set_num_threads(threads)
        self._generator = TextGenerator(path, progress=False)
        # Not from the model: a second start opens none.
        self._vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
        self._calls = 0

    def run(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        import torch

        # Another prompt every time: the beginning of one that was read before is not read again.
        self._calls += 1
        generator = torch.Generator().manual_seed(self._calls)
        tokens = torch.randint(self._vocabulary, (batch, prompt), generator=generator)
        prompts = [row[None] for row in tokens]
        began = time.perf_counter()
        results = self._generator.generate(prompts, max_new_tokens=new, eos_token_id=-1)  # all of its tokens
        seconds = time.perf_counter() - began
        compiled = max(result.compile_seconds for result in results)
        prefill = max(result.prefill_seconds for result in results)
        return prefill, seconds - compiled - prefill


class Llama:
    """A file of llama.cpp."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        self._model: Any = None
        self._shape = (0, 0)

    def run(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        import numpy as np
        from laptop_llama import Llama as Model

        if self._shape != (batch, prompt + new):
            self._model = None  # the memory of one, not of two
            self._model = Model(self._path, self._threads, prompt + new, batch)
            self._shape = (batch, prompt + new)
        tokens = np.random.default_rng(0).integers(0, self._model.vocabulary, (batch, prompt))
        return self._model.generate(tokens, new)


def resident_mb() -> float:
    """Return the resident memory of this process in 10^6 bytes, without pages of files that others map, too."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    # What libraries print does not mix with answers.
    _ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
