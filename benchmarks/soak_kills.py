"""Compressions that are killed at random moments, or that run out of disk: resumed, they end in the undisturbed folder."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from soak_cases import TINY, TINY_LLAMA, Campaign, Case, in_processes, one_line, write_tiny_llama

import dbf_compile
from dbf_compile.errors import DBFError
from dbf_compile.integrations import experts, pretrained  # noqa: F401  # children find them imported
from dbf_compile.run.report import PAGE, REPORT
from dbf_compile.run.workers import compress_in_processes

MODES = ("independent", "block")
# How many call compress at once; "2, spawned" is compress_in_processes, whose processes import everything anew.
PROCESSES = ("1", "2", "2, spawned")
SECONDS = 1200  # of a whole case
# Of the report: times, and memory, which is that of a process.
CHANGING = ("created", "memory", "seconds", "time")
SMALLEST_DISK = 64  # bytes of a file
PATIENCE = 300  # seconds of one run
LOOK = 0.01  # seconds from one look at a process to the next


@dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nothing disturbs, and how long it takes."""

    content: dict[str, Any]
    seconds: float


def run(seeds: Iterable[int], quick: bool) -> Iterator[Case]:
    """Yield one compression for each seed, disturbed until it ends."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = write_tiny_llama(folder / "dense")
        # A short one first: the first run of all pays for what is imported on demand.
        undisturbed = {
            mode: _undisturbed(dense, folder / mode, mode) for mode in (MODES[:1] if quick else MODES)
        }
        yield from in_processes(seeds, partial(_case, dense, folder, undisturbed), slots=1, timeout=SECONDS)


def _undisturbed(dense: Path, output: Path, mode: str) -> Undisturbed:
    start = time.monotonic()
    status = _Fork(partial(_compress, dense, output, mode)).wait(PATIENCE)
    if status != 0:
        raise SystemExit(f"the undisturbed run ended with {status}")
    return Undisturbed(_content(output), time.monotonic() - start)


def _case(dense: Path, folder: Path, undisturbed: dict[str, Undisturbed], seed: int) -> Case:
    random = Random(seed)
    mode, processes, full = random.choices(
        list(product(undisturbed, PROCESSES, (False, True))), _weights(undisturbed)
    )[0]
    expected = undisturbed[mode]
    output = folder / str(seed) / "compressed"
    output.parent.mkdir()
    what = f"{mode}, processes: {processes}, {'disk full' if full else 'killed'}"
    run_ = partial(_compress if processes != "2, spawned" else _compress_in_two, dense, output, mode)
    number = 2 if processes == "2" else 1
    disturbed, log = 0, []
    for attempt in range(4):
        log.append(_disturb(run_, number, full, expected, random))
        disturbed += log[-1] != "ended"
        if log[-1].startswith("BAD"):
            return Case(seed, what, "AN UNCLEAR ERROR", True, "; ".join(log), disturbed)
        if output.exists() or (attempt and random.random() < 0.5):
            break
    last = _Fork(run_)
    status = last.wait(PATIENCE)
    last.end()
    log.append(f"resumed: {status}")
    outcome, difference = _compared(output, status, expected)
    leftovers = sum(path.name.startswith(".") for path in output.parent.iterdir())
    log.append(f"{leftovers} temporary folders left{difference}")
    return Case(seed, what, outcome, outcome != "the same folder", "; ".join(log), disturbed)


def _weights(modes: Iterable[str]) -> list[int]:
    """Return how often each scenario is drawn: spawned processes seldom, since they import for seconds."""
    return [
        1 if processes == "2, spawned" else 5 for _, processes, _ in product(modes, PROCESSES, (False, True))
    ]


def _disturb(run_: Callable[[], None], number: int, full: bool, expected: Undisturbed, random: Random) -> str:
    """Run until it is disturbed; return what became of it."""
    if full:
        sizes = [len(content) for content in expected.content.values() if isinstance(content, bytes)]
        limit = round(math.exp(random.uniform(math.log(SMALLEST_DISK), math.log(max(sizes)))))
        processes = [_Fork(run_, limit) for _ in range(number)]
        statuses = [process.wait(PATIENCE) for process in processes]
        for process in processes:
            process.end()
        if all(status == 0 for status in statuses):
            return "ended"
        return f"{'BAD: ' if 2 in statuses or None in statuses else ''}{limit} bytes a file: {statuses}"
    processes = [_Fork(run_) for _ in range(number)]
    seconds = random.uniform(0, 1.1 * expected.seconds * number)
    time.sleep(seconds)
    if all(process.ended() for process in processes):
        return "ended"
    # All of them at once, or one, while the others go on and must end well.
    killed = processes if random.random() < 0.5 else processes[:1]
    for process in killed:
        process.kill()
    statuses = [process.wait(PATIENCE) for process in processes]
    for process in processes:
        process.end()
    others = statuses[len(killed) :]
    return f"{'BAD: ' if any(others) or None in others else ''}killed after {seconds:.2f} s: {statuses}"


def _compared(output: Path, status: int | None, expected: Undisturbed) -> tuple[str, str]:
    """Return the outcome, and where the folder differs."""
    if status != 0 or not output.exists():
        return "HANG" if status is None else "DOES NOT END", ""
    content = _content(output)
    for name in sorted({*content, *expected.content}):
        if content.get(name) != expected.content.get(name):
            return "ANOTHER FOLDER", f"; {name}{_difference(content.get(name), expected.content.get(name))}"
    return ("WORK IS LEFT" if output.with_name(f"{output.name}.work").exists() else "the same folder"), ""


def _content(folder: Path) -> dict[str, Any]:
    """Return the content of all files; of the report without its times, and without the page that shows them."""
    content: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PAGE}
    content[REPORT] = _without_times(json.loads(content[REPORT]))
    return content


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in CHANGING}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _difference(one: Any, other: Any) -> str:
    """Return the place of the first difference of two JSON values, and both."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in {**one, **other} if one.get(key) != other.get(key))
        return f"/{key}{_difference(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        place = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return f"/{place}{_difference(one[place], other[place])}"
    return (
        ""
        if isinstance(one, bytes) or isinstance(other, bytes)
        else f" = {str(one)[:80]}, not {str(other)[:80]}"
    )


# Processes


class _Fork:
    """A forked process, the head of a group of its own; it finds everything imported."""

    def __init__(self, work: Callable[[], None], file_size: int | None = None) -> None:
        self.status: int | None = None
        self.id = os.fork()
        if self.id == 0:
            os.setsid()
            _silence()
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            os._exit(_exit_code(work))

    def ended(self) -> bool:
        """Return whether the process has ended."""
        if self.status is None:
            done, status = os.waitpid(self.id, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if done else None
        return self.status is not None

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if there is none in time."""
        # Looks are counted, not seconds: what holds this process holds the other, too.
        for _ in range(round(seconds / LOOK)):
            if self.ended():
                break
            time.sleep(LOOK)
        return self.status

    def kill(self) -> None:
        """Kill the process alone; those that it has started go on."""
        if not self.ended():
            os.kill(self.id, signal.SIGKILL)

    def end(self) -> None:
        """Kill the whole group."""
        try:
            os.killpg(self.id, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.wait(1)


def _exit_code(work: Callable[[], None]) -> int:
    """Return 0 for success, 1 for an error that says what to do, 2 for any other."""
    try:
        work()
    except BaseException as error:
        os.write(2, f"{one_line(error)}\n".encode())
        return 1 if isinstance(error, DBFError) else 2
    return 0


def _silence() -> None:
    if "SOAK_SHOW" not in os.environ:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)


def _compress(dense: Path, output: Path, mode: str) -> None:
    dbf_compile.compress(dense, output, batches=_batches(), mode=mode, **TINY)


def _compress_in_two(dense: Path, output: Path, mode: str) -> None:
    compress_in_processes(dense, output, processes=2, batches=_batches(), mode=mode, **TINY)


def _batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, TINY_LLAMA["vocab_size"], (6, 1, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": window} for window in ids]


CAMPAIGN = Campaign("kills", 200, 1, run)
