"""Cores and devices that this process may use."""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dbf_compile.errors import OptionError, first_line

_PARALLEL = 1 << 17  # elements that torch fills with several threads
_STARTED = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # variables of a process that was started with others
_PROCESSOR, _CORES = Path("/proc/cpuinfo"), Path("/proc/stat")
_LOOK_SECONDS, _BUSY_CORES = 1.0, 0.25
_NARROW = {"avx512_bf16", "amx_bf16"}  # what Linux calls instructions for products of bfloat16 numbers


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_cores() -> Iterator[None]:
    """Give torch every core of this process, with threads that soon sleep where they wait for each other on a busy machine.

    A waiting thread of GNU's OpenMP spins for milliseconds, unless the library manages more threads than there are cores.
    Beside other programs, spinning threads then hold the cores that those they wait for need. An idle team makes them
    sleep: training a block of 192 features beside eight busy processes took 23.6 s of two cores' time without, 2.6 s with.
    On an idle machine sleeping costs: an update of ADMM took 1.6 to 2.2 times as long. So the team is there only while others
    compute, which is looked at every second.
    """
    before = torch.get_num_threads()
    ended = threading.Event()
    try:
        torch.set_num_threads(cores())
        threading.Thread(target=_hold_idle_teams, args=(ended,), name="idle team", daemon=True).start()
        yield
    finally:
        ended.set()
        torch.set_num_threads(before)


def _hold_idle_teams(ended: threading.Event) -> None:
    """Hold an idle team for as long as other processes compute on the cores of this one."""
    dissolved: threading.Event | None = None
    load = OtherLoad()
    while not ended.wait(_LOOK_SECONDS):
        if load.cores() < _BUSY_CORES:
            if dissolved is not None:
                dissolved.set()
                dissolved = None
        elif dissolved is None:
            dissolved = threading.Event()
            threading.Thread(target=_idle_team, args=(dissolved,), name="idle team", daemon=True).start()
    if dissolved is not None:
        dissolved.set()


def _idle_team(dissolved: threading.Event) -> None:
    torch.empty(_PARALLEL).fill_(0.0)  # forms a team, which lives as long as this thread
    dissolved.wait()


class OtherLoad:
    """How much other processes compute on the cores of this one."""

    def __init__(self) -> None:
        self._last = self._now()

    def cores(self) -> float:
        """Return how many cores were busy for others since the last call; infinite where the system does not say."""
        before, self._last = self._last, self._now()
        if math.inf in self._last:
            return math.inf
        passed, busy, own = (now - then for now, then in zip(self._last, before, strict=True))
        return (busy - own) / passed if passed > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return seconds: passed, those of all busy cores, those of this process."""
        try:
            lines = _CORES.read_text().splitlines()
            tick = os.sysconf("SC_CLK_TCK")
            mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        except (OSError, AttributeError, ValueError):
            return time.monotonic(), math.inf, 0.0
        fields = [line.split() for line in lines]
        # user, nice, system; not idle, nor waiting for a disk.
        busy = sum(sum(map(int, values[:3])) for name, *values in fields if name in mine)
        return time.monotonic(), busy / tick, time.process_time()


def chosen_device(device: torch.device | str | None) -> torch.device:
    """Return the device to compute on.

    Args:
        device: as the user says it. None is a GPU, or the CPU where there is none. Among several ranks, None and "cuda" are this
            rank's own GPU.
    """
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")  # of torchrun, or of srun
    has_gpu = torch.cuda.is_available()
    if device is not None and not (str(device) == "cuda" and rank and has_gpu):
        return with_index(device)
    return (
        torch.device("cuda", int(rank or "0") % torch.cuda.device_count()) if has_gpu else torch.device("cpu")
    )


def has_peers() -> bool:
    """Return whether torchrun or Accelerate has started other processes with this one."""
    return all(os.environ.get(name) for name in _STARTED) and int(os.environ["WORLD_SIZE"]) > 1


def with_index(device: torch.device | str) -> torch.device:
    """Return the device with its index, as tensors report it: "cuda" is "cuda:0"."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that torch cannot use here
        raise OptionError(
            f"device={str(device)!r} ({first_line(error)})",
            "a device that torch can use here, such as 'cpu'",
            "leave device out for a GPU if there is one",
        ) from error


@cache
def multiplies_bfloat16(kind: str) -> bool:
    """Return whether devices of type ``kind`` multiply bfloat16 matrices in half the time of float32 ones or less."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and bool(_NARROW & set(instructions().split()))


def instructions() -> str:
    """Return the processor's instruction set extensions as Linux lists them, or its name where there is no list."""
    if not _PROCESSOR.is_file():
        return platform.processor() or platform.machine()
    lines = _PROCESSOR.read_text().splitlines()
    # "flags" of x86, "Features" of Arm.
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def narrow_products(device: torch.device) -> AbstractContextManager[Any]:
    """Let matrix products round what they multiply to bfloat16, where the device gains by it."""
    if not multiplies_bfloat16(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def default_workers(device: torch.device) -> int:
    """Return the number of weights to factor at a time: one for a GPU, else one for each core of this rank of torchrun."""
    if device.type != "cpu":
        return 1
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
