"""Counters of energy on pretended trees of sysfs and a pretended NVML."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.counters import GPU, Nvml, NvmlError, zone

from dbf_compile.counters import Meter, RaplCounter, nvml_counter, rapl_counters


def test_sockets_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    for socket in (0, 1):
        zone(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 1000)
        zone(tmp_path, f"intel-rapl:{socket}:0", "core", 1000)
        zone(tmp_path, f"intel-rapl:{socket}:1", "dram", 1000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1000)  # the same once more
    zone(tmp_path, "intel-rapl:2", "psys", 1000)  # the whole machine
    counters, missing = rapl_counters(tmp_path)
    assert [*counters] == ["package", "dram"] and not missing
    for folder in tmp_path.iterdir():
        (folder / "energy_uj").write_text("3001000\n")
    assert counters["package"].joules() == counters["dram"].joules() == 6.0


@given(st.lists(st.integers(0, 999), max_size=20), st.integers(0, 999))
def test_a_counter_that_wraps_counts_on(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], start: int
) -> None:
    root = tmp_path_factory.mktemp("rapl")
    folder = zone(root, "intel-rapl:0", "package-0", start, most=1000)
    counter, total = RaplCounter([folder]), 0
    for step in steps:
        total += step
        (folder / "energy_uj").write_text(str((start + total) % 1000))
        assert counter.joules() == pytest.approx(total / 1e6)


def test_without_zones_everything_is_missing(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        counters, missing = rapl_counters(root)
        assert not counters and [*missing] == ["package", "dram"]
        assert all(
            reason == f"no RAPL in {root}: virtual machines have none, nor systems without its driver"
            for reason in missing.values()
        )


def test_a_processor_without_a_counter_of_its_memory(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    (tmp_path / "intel-rapl:1").mkdir()  # without a name
    counters, missing = rapl_counters(tmp_path)
    assert [*counters] == ["package"] and "does not count it" in missing["dram"]


@pytest.mark.parametrize("name", ["energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize("spoil", ["text", "absent", "closed"])
def test_a_file_that_cannot_be_read_is_a_reason(
    tmp_path: Path, name: str, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1) / name
    if spoil == "text":
        path.write_text("much")
    elif spoil == "absent":
        path.unlink()
    else:
        read = Path.read_text

        def refuse(self: Path, *arguments: object) -> str:
            if self == path:  # root, as whom tests may run, reads everything
                raise PermissionError(13, os.strerror(13), str(path))
            return read(self)

        monkeypatch.setattr(Path, "read_text", refuse)
    counters, missing = rapl_counters(tmp_path)
    assert not counters
    words = {"text": "holds no number", "absent": "No such file", "closed": f"sudo chmod a+r {path}"}
    assert words[spoil] in missing["package"] and str(path) in missing["package"]


def test_a_meter_measures_and_loses_what_fails(tmp_path: Path) -> None:
    package, dram = (
        zone(tmp_path, "intel-rapl:0", "package-0", 0),
        zone(tmp_path, "intel-rapl:0:0", "dram", 0),
    )
    meter = Meter.of(torch.device("cpu"), tmp_path)

    def run() -> None:
        (package / "energy_uj").write_text("5000000")
        (dram / "energy_uj").unlink()

    use = meter.measure(run)
    assert use.joules == {"package": 5.0} and 0 < use.seconds < 60
    assert meter.names == ["package"] and "No such file" in meter.missing["dram"]


def test_a_long_run_may_wrap_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbf_compile.counters._POLL_SECONDS", 0.001)
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0, most=1000)
    meter = Meter.of(torch.device("cpu"), tmp_path)
    counter = meter._counters["package"]
    seen: list[float] = []
    joules = counter.joules
    monkeypatch.setattr(counter, "joules", lambda: seen.append(joules()) or seen[-1])

    def run() -> None:
        for value in (600, 200, 800, 400, 0):
            before = len(seen)
            swap = folder / "new"
            swap.write_text(str(value))
            swap.replace(folder / "energy_uj")  # whole, as the kernel gives it
            while len(seen) < before + 2:
                time.sleep(0.0005)

    assert meter.measure(run).joules["package"] == pytest.approx(0.003)


def test_an_error_of_the_run_is_passed_on(tmp_path: Path) -> None:
    meter = Meter.of(torch.device("cpu"), tmp_path)
    with pytest.raises(ZeroDivisionError):
        meter.measure(lambda: 1 // 0)


def test_a_gpu_is_matched_by_its_identity() -> None:
    nvml = Nvml({f"GPU-{GPU}": 2500, "GPU-other": 7})
    counter = nvml_counter(GPU, nvml)
    assert not isinstance(counter, str) and counter.joules() == 2.5
    assert nvml_counter("none", nvml) == "no GPU none"


def test_a_gpu_that_does_not_count_says_so() -> None:
    assert nvml_counter(GPU, Nvml({f"MIG-{GPU}": NvmlError("Not Supported")})) == "NVML: Not Supported"
    assert nvml_counter(GPU, Nvml({}, NvmlError("Driver Not Loaded"))) == "NVML: Driver Not Loaded"


def test_without_its_package_a_gpu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert nvml_counter(GPU) == "no package pynvml: pip install 'dbf-compile[energy]'"


@pytest.mark.parametrize("counted", [True, False])
def test_a_meter_of_a_gpu_has_the_processor_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    properties = type("Properties", (), {"uuid": GPU})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    nvml = Nvml({f"GPU-{GPU}": 1 if counted else NvmlError("Not Supported")})
    meter = Meter.of(torch.device("cuda"), tmp_path, nvml)
    assert meter.names == (["package", "gpu"] if counted else ["package"])
    assert ("gpu" in meter.missing) != counted
