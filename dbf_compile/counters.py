"""Counters of energy: RAPL of a processor and its memory, NVML of an NVIDIA GPU.

A counter that is not there, or cannot be read, is missing for a reason that a user can act on; it never counts as zero.

Sources: the kernel's powercap interface (Documentation/power/powercap/powercap.rst), whose zones also name the packages of AMD's
processors; ``nvmlDeviceGetTotalEnergyConsumption`` of NVML, in millijoules since the driver was loaded.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
_DOMAINS = ("package", "dram")
# A counter of 32 bits holds 65 kJ or more: it wraps once in this time at most, whatever the machine.
_POLL_SECONDS = 5.0


class Counter(Protocol):
    """Something that counts energy."""

    def joules(self) -> float:
        """Return the energy since some moment in the past.

        Raises:
            OSError: the counter cannot be read.
        """
        ...


class Use(NamedTuple):
    """What was used meanwhile.

    Attributes:
        seconds: how long it took.
        joules: by counter; one that could not be read is not there.
    """

    seconds: float
    joules: dict[str, float]


class RaplCounter:
    """A domain of RAPL, such as "dram", added up over the sockets of a machine.

    Args:
        zones: folders of the domain's zones, each with ``energy_uj`` and ``max_energy_range_uj``.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = tuple(zones)
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._last = [_number(zone / "energy_uj") for zone in zones]
        self._total = 0

    def joules(self) -> float:
        """Return the energy since the counter was made, which may have wrapped once since the last call."""
        for place, zone in enumerate(self._zones):
            now = _number(zone / "energy_uj")
            passed = now - self._last[place]
            self._total += passed if passed >= 0 else passed + self._ranges[place]
            self._last[place] = now
        return self._total / 1e6


class NvmlCounter:
    """The energy of a GPU.

    Args:
        nvml: the module ``pynvml``, initialized.
        handle: of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Return the energy since the driver was loaded."""
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error


def rapl_counters(root: Path = POWERCAP) -> tuple[dict[str, Counter], dict[str, str]]:
    """Return the counters "package" and "dram" of a machine, and why others of them are missing.

    Args:
        root: the folder of the kernel's zones.
    """
    counters: dict[str, Counter] = {}
    missing: dict[str, str] = {}
    zones: dict[str, list[Path]] = {}
    for zone in sorted(
        root.glob("intel-rapl:*")
    ):  # AMD's, too; the same zones by memory map are intel-rapl-mmio
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        zones.setdefault(name.partition("-")[0], []).append(zone)  # package-0, package-1-die-0
    for domain in _DOMAINS:
        if not zones:
            missing[domain] = f"no RAPL in {root}: virtual machines have none, nor systems without its driver"
        elif domain not in zones:
            missing[domain] = f"no RAPL zone of this name in {root}: this processor does not count it"
        else:
            try:
                counters[domain] = RaplCounter(zones[domain])
            except OSError as error:
                missing[domain] = _reason(error)
    return counters, missing


def nvml_counter(uuid: str, nvml: Any = None) -> NvmlCounter | str:
    """Return the counter of a GPU, or why there is none.

    Args:
        uuid: of the GPU, as CUDA has it, without a prefix: an index would be another GPU where some are hidden.
        nvml: the module ``pynvml``; None to import it.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return "no package pynvml: pip install 'dbf-compile[energy]'"
    reason = f"no GPU {uuid}"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"NVML: {error}"
    for prefix in ("GPU-", "MIG-"):
        try:
            counter = NvmlCounter(nvml, nvml.nvmlDeviceGetHandleByUUID(prefix + uuid))
            counter.joules()
            return counter
        except nvml.NVMLError:
            continue
        except OSError as error:  # a part of a GPU, or one older than Volta
            reason = str(error)
    return reason


class Meter:
    """Measures the energy of what runs, with the counters of a machine.

    Args:
        counters: by name.
        missing: names of others, and why they are missing. Counters that fail later are added.
    """

    def __init__(self, counters: Mapping[str, Counter], missing: Mapping[str, str]) -> None:
        self.missing = dict(missing)
        self._counters = dict(counters)
        self._lock = threading.Lock()

    @staticmethod
    def of(device: torch.device, root: Path = POWERCAP, nvml: Any = None) -> Meter:
        """Return the meter of a device and of the processor beside it.

        Args:
            device: where a model computes.
            root, nvml: as for :func:`rapl_counters` and :func:`nvml_counter`.
        """
        counters, missing = rapl_counters(root)
        if device.type == "cuda":
            gpu = nvml_counter(str(torch.cuda.get_device_properties(device).uuid), nvml)
            if isinstance(gpu, str):
                missing["gpu"] = gpu
            else:
                counters["gpu"] = gpu
        return Meter(counters, missing)

    @property
    def names(self) -> list[str]:
        """The counters that can be read."""
        return list(self._counters)

    def measure(self, run: Callable[[], object]) -> Use:
        """Return what a call takes; counters are also read meanwhile, as they wrap."""
        before = self._read()
        began = time.perf_counter()
        with self._polled():
            run()
            seconds = time.perf_counter() - began
        after = self._read()
        return Use(seconds, {name: after[name] - before[name] for name in after})

    def lose(self, name: str, reason: str) -> None:
        """Note that a counter is missing from now on."""
        self._counters.pop(name, None)
        self.missing[name] = reason

    def _read(self) -> dict[str, float]:
        with self._lock:
            values = {}
            for name, counter in list(self._counters.items()):
                try:
                    values[name] = counter.joules()
                except OSError as error:
                    self.lose(name, _reason(error))
            return values

    @contextmanager
    def _polled(self) -> Iterator[None]:
        stop = threading.Event()

        def poll() -> None:
            while not stop.wait(_POLL_SECONDS):
                self._read()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except ValueError as error:
        raise OSError(f"{path} holds no number") from error


def _reason(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{error.filename} is for root alone: run as root, or sudo chmod a+r {error.filename}"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
