"""The energy of a token on a pretended machine, whose clock and counters go on as its programs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.counters import GPU, Nvml, zone

from dbf_compile import counters, energy
from dbf_compile.counters import Meter
from dbf_compile.energy import energy_of_models, measure_energy
from dbf_compile.errors import OptionError

RANGE = 1 << 28  # microjoules: counters wrap now and then


class Machine:
    """A machine with an idle power, whose programs take time and energy once and for every token."""

    def __init__(self, root: Path, idle: dict[str, int]) -> None:
        self.now, self.idle = 0.0, idle
        self.used = dict.fromkeys(idle, 0)  # microjoules
        self.runs: list[str] = []
        self._zones = {
            name: zone(root, f"intel-rapl:{place}", f"{name}-0" if name == "package" else name, 0, RANGE)
            for place, name in enumerate(name for name in idle if name != "gpu")
        }
        self.nvml = Nvml({f"GPU-{GPU}": 0})

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self._spend(seconds, 0)

    def program(self, name: str, once: int, token: int, seconds: float) -> Callable[[int], None]:
        def run(tokens: int) -> None:
            self.runs.append(name)
            self._spend(0.5 + tokens * seconds, once + tokens * token)

        return run

    def _spend(self, seconds: float, energy: int) -> None:
        self.now += seconds
        for name, watts in self.idle.items():
            self.used[name] += energy + round(watts * seconds * 1e6)
            if name in self._zones:
                (self._zones[name] / "energy_uj").write_text(str(self.used[name] % RANGE))
        self.nvml.counters[f"GPU-{GPU}"] = self.used.get("gpu", 0) // 1000
        self.meter._read()

    meter: Meter


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], Machine]:
    """Return what makes a machine; its GPU is there if it has an idle power."""
    places: Iterator[Path] = (tmp_path / str(number) for number in range(1000))

    def make(idle: dict[str, int]) -> Machine:
        root = next(places)
        root.mkdir()
        machine = Machine(root, idle)
        clock = SimpleNamespace(perf_counter=machine.perf_counter, sleep=machine.sleep)
        monkeypatch.setattr(counters, "time", clock)
        monkeypatch.setattr(energy, "time", clock)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=GPU))
        machine.meter = Meter.of(torch.device("cuda" if "gpu" in idle else "cpu"), root, machine.nvml)
        return machine

    return make


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    watts=st.integers(0, 90),
    once=st.integers(0, 5),
    token=st.integers(1, 900),
    tokens=st.integers(2, 40),
)
def test_what_both_runs_do_once_and_the_idle_machine_cancel(
    machine: Callable[[dict[str, int]], Machine], watts: int, once: int, token: int, tokens: int
) -> None:
    pretended = machine({"package": watts, "dram": 2})
    run = pretended.program("one", once * 100_000, token * 100, 0.02)
    figures = measure_energy({"one": run}, tokens, 2, meter=pretended.meter)["one"]
    assert figures.seconds == pytest.approx(0.02)
    assert figures.idle_watts == pytest.approx({"package": watts, "dram": 2})
    for name, idle in (("package", watts), ("dram", 2)):
        assert figures.joules[name] == pytest.approx(token / 1e4, rel=1e-3, abs=1e-4)
        assert figures.joules_with_idle[name] == pytest.approx(token / 1e4 + idle * 0.02, rel=1e-3, abs=1e-4)
    assert not figures.missing and len(figures.rounds) == 2


def test_programs_take_turns(machine: Callable[[dict[str, int]], Machine]) -> None:
    pretended = machine({"package": 10, "gpu": 50})
    runs = {name: pretended.program(name, 0, cost, 0.1) for name, cost in (("a", 30_000), ("b", 60_000))}
    figures = measure_energy(runs, 64, 3, meter=pretended.meter)
    order = [
        name for place, name in enumerate(pretended.runs) if place == 0 or pretended.runs[place - 1] != name
    ]
    assert order == ["a", "b"] + ["a", "b"] * 3  # warming up, then three rounds
    assert figures["a"].joules == pytest.approx({"package": 0.03, "gpu": 0.03, "dram": None}, abs=1e-4)
    assert figures["b"].joules["gpu"] == pytest.approx(0.06, abs=1e-4)
    assert [*figures["a"].missing] == ["dram"]


def test_a_counter_that_fails_or_stands_still_is_missing_and_not_zero(
    machine: Callable[[dict[str, int]], Machine], tmp_path: Path
) -> None:
    pretended = machine({"package": 10, "dram": 5})
    dram = pretended._zones["dram"] / "energy_uj"

    def run(tokens: int) -> None:
        pretended.program("one", 0, 1000, 0.1)(tokens)
        if len(pretended.runs) > 8:
            dram.unlink(missing_ok=True)
            pretended._zones.pop("dram", None)
            pretended._zones["package"].joinpath("energy_uj").write_text("0")

    def still(tokens: int) -> None:
        pretended.now += tokens

    lost = measure_energy({"one": run}, 16, 3, meter=pretended.meter)["one"]
    assert lost.joules["dram"] is None and lost.idle_watts["dram"] is None
    assert "No such file" in lost.missing["dram"] and lost.joules["package"] is not None
    root = tmp_path / "still"
    root.mkdir()
    zone(root, "intel-rapl:0", "package-0", 12345)
    meter = Meter.of(torch.device("cpu"), root)
    standing = measure_energy({"one": still}, 16, 1, meter=meter)["one"]
    assert standing.joules == {"package": None, "dram": None}
    assert standing.missing["package"] == "the counter stands still"


def test_without_a_counter_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter.of, "__defaults__", (tmp_path, None))
    figures = energy_of_models(["no such model", "nor this"], 8, 16, device="cpu", progress=True)
    for one in figures.values():
        assert one.joules == one.joules_with_idle == one.idle_watts == {"package": None, "dram": None}
        assert one.seconds is None and not one.rounds and "virtual machines" in one.missing["package"]
    assert [*figures] == ["no such model", "nor this"]
    assert "no energy of dram: no RAPL in" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "rounds"), [(1, 5), (64, 0)])
def test_too_little_to_measure_is_refused(tokens: int, rounds: int) -> None:
    with pytest.raises(OptionError, match="2 tokens or more, 1 round or more"):
        measure_energy({}, tokens, rounds)


def test_models_generate_as_many_tokens_as_they_are_asked_for(
    machine: Callable[[dict[str, int]], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = machine({"package": 1})
    asked: list[int] = []

    class Generator:
        def __init__(self, name: str, **_: object) -> None:
            self.tokenizer, self.model = range(30), torch.nn.Linear(1, 1)

        def generate(self, prompt: torch.Tensor, max_new_tokens: int, eos_token_id: int) -> None:
            assert prompt.shape == (1, 8) and eos_token_id == -1 and int(prompt.max()) < 30
            asked.append(max_new_tokens)
            pretended.program("one", 0, 1000, 1.0)(max_new_tokens)

    monkeypatch.setattr(energy, "TextGenerator", Generator)
    monkeypatch.setattr(Meter, "of", staticmethod(lambda device: pretended.meter))
    figures = energy_of_models(["one"], 8, 16, rounds=1, device="cpu")["one"]
    assert figures.joules["package"] == pytest.approx(0.001, abs=1e-5)
    assert asked == [2, 16, 16, 2, 16]
