"""What all campaigns share: a case and its outcome, processes that may crash or hang, and a tiny model to damage."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SPARE_BYTES = 4 << 30  # that a case may allocate beyond what its parent had
TIMEOUT = 120  # seconds of a case: a load takes 0.1, a compression 5
LOOK = 1.0  # seconds from one look at what runs to the next

# Two query heads share a key; 44 is no multiple of 32; q, k and v are factored as one.
TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Few iterations: campaigns are about what is kept and loaded, not about quality.
TINY = {
    "bits": 4.0,
    "iterations": 3,
    "length": 16,
    "windows": 6,
    "own_text": 0,
    "holdout": 2,
    "tune": 1,
    "refine": 1,
    "distill": 1,
    "progress": False,
}


@dataclass(frozen=True)
class Case:
    """What became of one seed.

    Args:
        seed: from which the case follows.
        what: the kind of case, for the table.
        outcome: in words, for the table.
        bad: whether this must not happen.
        detail: what was done and what came of it.
        amount: what the size of a campaign counts: loads, kills, calls or seconds.
    """

    seed: int
    what: str
    outcome: str
    bad: bool = False
    detail: str = ""
    amount: int = 1


@dataclass(frozen=True)
class Campaign:
    """One way to look for faults.

    Args:
        unit: what its size counts.
        size: in full.
        quick: the same, for a test of the campaign itself.
        run: yields the cases of seeds as they end, in any order.
    """

    unit: str
    size: int
    quick: int
    run: Callable[[Iterable[int], bool], Iterator[Case]]


def write_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Write a random dense model to a folder and return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).save_pretrained(folder)
    return folder


def in_processes(
    seeds: Iterable[int],
    work: Callable[[int], Case],
    slots: int = 2,
    timeout: float = TIMEOUT,
) -> Iterator[Case]:
    """Run every seed in a forked process of its own; a crash or a hang is a bad case, and harms no other.

    Args:
        seeds: of the cases.
        work: runs one.
        slots: how many run at a time.
        timeout: seconds after which one is killed.
    """
    running: dict[Connection, _Running] = {}
    todo = iter(seeds)
    try:
        while True:
            while len(running) < slots and (seed := next(todo, None)) is not None:
                one = _Running(seed, work, timeout)
                running[one.results] = one
            if not running:
                return
            before = time.monotonic()
            ready = wait(list(running), timeout=LOOK)
            # What holds this process holds those that it has started, too: only time between two looks counts.
            passed = min(LOOK, time.monotonic() - before)
            for one in running.values():
                one.left -= passed
            late = [channel for channel, one in running.items() if one.left <= 0]
            for channel in {*ready, *late}:
                yield running.pop(channel).case()
    finally:
        for one in running.values():
            one.kill()


class _Running:
    """A case in a process."""

    def __init__(self, seed: int, work: Callable[[int], Case], timeout: float) -> None:
        self.seed = seed
        self.results, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_work, args=(sender, work, seed))
        self._process.start()
        sender.close()
        self.left = timeout

    def case(self) -> Case:
        """Return the case; kill its process if it is still running."""
        if not self.results.poll():
            self.kill()
            return Case(self.seed, "any", "hang", True, "no answer in time")
        try:
            case: Case = self.results.recv()
        except EOFError:
            self._process.join()
            return Case(self.seed, "any", "crash", True, f"exit code {self._process.exitcode}")
        self.kill()
        return case

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.join()
        self.results.close()


def _work(sender: Connection, work: Callable[[int], Case], seed: int) -> None:
    try:
        case = work(seed)
    except BaseException:  # the campaign itself is at fault
        case = Case(seed, "any", "the campaign failed", True, traceback.format_exc()[-2000:])
    sender.send(case)
    sender.close()
    os._exit(0)  # leave no time for finalizers of libraries that do not expect a fork


def limit_memory() -> None:
    """Let this process allocate no more than some bytes beside those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def one_line(error: BaseException) -> str:
    """Return type and message of an error, short."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def first_frames(error: BaseException) -> Sequence[Any]:
    """Return the frames that an error, and those that it follows from, passed through."""
    frames: list[Any] = []
    following: BaseException | None = error
    while following is not None:
        frames += traceback.extract_tb(following.__traceback__)
        following = following.__cause__ or following.__context__
    return frames
