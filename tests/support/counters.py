"""Pretended counters of energy: zones of sysfs, and NVML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GPU = "0e1f0000-1111-2222-3333-444455556666"


def zone(root: Path, folder: str, name: str, energy: int, most: int = 1 << 40) -> Path:
    """Write a zone as the kernel shows it, and return its folder; energies in microjoules."""
    path = root / folder
    path.mkdir()
    for file, content in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (path / file).write_text(f"{content}\n")
    return path


class NvmlError(Exception):
    """What NVML raises."""


class Nvml:
    """NVML of GPUs whose counters stand at a value in millijoules, or fail.

    Args:
        counters: by identity.
        broken: what starting it raises, or None.
    """

    NVMLError = NvmlError

    def __init__(self, counters: dict[str, int | NvmlError], broken: NvmlError | None = None) -> None:
        self.counters, self._broken = counters, broken

    def nvmlInit(self) -> None:  # noqa: N802  its name
        if self._broken is not None:
            raise self._broken

    def nvmlDeviceGetHandleByUUID(self, identity: str) -> str:  # noqa: N802  its name
        if identity not in self.counters:
            raise NvmlError("Not Found")
        return identity

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> Any:  # noqa: N802  its name
        value = self.counters[handle]
        if isinstance(value, NvmlError):
            raise value
        return value
