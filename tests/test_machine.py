"""What a process may use: cores that ranks share, and the device of each rank."""

import math
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile import machine
from dbf_compile.errors import OptionError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_a_gpu_the_cpu_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.chosen_device(None) == torch.device("cpu")


@pytest.mark.parametrize(
    ("ranks", "index"),
    [
        ({}, 0),
        *(({name: str(rank)}, rank % 2) for name in ("LOCAL_RANK", "SLURM_LOCALID") for rank in (0, 1, 3)),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1),  # torchrun, started once by srun
    ],
)
def test_every_local_rank_has_its_gpu(two_gpus, monkeypatch, ranks, index):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, rank in ranks.items():
        monkeypatch.setenv(name, rank)
    assert machine.chosen_device(None) == torch.device("cuda", index)
    if ranks:  # else "cuda" is the current one
        assert (
            machine.chosen_device("cuda")
            == machine.chosen_device(torch.device("cuda"))
            == torch.device("cuda", index)
        )


def test_a_device_that_is_named_is_taken_and_has_the_index_of_its_tensors(two_gpus):
    assert machine.chosen_device("cpu") == torch.device("cpu")
    assert machine.with_index("meta") == torch.empty(1, device="meta").device


@given(cores=st.integers(1, 256), ranks=st.integers(1, 300))
def test_ranks_share_the_cores_and_each_has_at_least_one_worker(cores, ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cores", lambda: cores)
        patch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        workers = machine.default_workers(torch.device("cpu"))
        assert workers == 1 or workers * ranks <= cores
        assert machine.default_workers(torch.device("cuda", 0)) == 1


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("device", ["cudaa", "cuda:x", "nonsense:0"])
def test_a_device_that_torch_does_not_know_is_refused(device):
    with pytest.raises(OptionError, match=f"device='{device}'.*'cpu'"):
        machine.chosen_device(device)


def idle_teams():
    return [thread for thread in threading.enumerate() if thread.name == "idle team"]


def waited_for(teams):
    """Return whether so many idle teams are there within ten seconds, the thread that looks among them."""
    ends = time.monotonic() + 10
    while len(idle_teams()) != teams and time.monotonic() < ends:
        time.sleep(0.005)
    return len(idle_teams()) == teams


@pytest.mark.parametrize("failing", [False, True])
def test_an_idle_team_is_there_while_others_compute_and_threads_are_restored(monkeypatch, failing):
    before, load = torch.get_num_threads(), [0.0]
    monkeypatch.setattr(machine, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(machine.OtherLoad, "cores", lambda self: load[0])
    try:
        with machine.all_cores():
            assert torch.get_num_threads() == machine.cores()
            for busy in (0.0, 1.5, 0.1, math.inf):
                load[0] = busy
                assert waited_for(2 if busy > 1 else 1)
            if failing:
                raise OptionError("a", "b", "c")
    except OptionError:
        assert failing
    assert waited_for(0)
    assert torch.get_num_threads() == before


def test_the_load_of_others_is_what_is_busy_and_not_ours(tmp_path, monkeypatch):
    stat, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(machine, "_CORES", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    clock = SimpleNamespace(monotonic=lambda: now[0], process_time=lambda: now[1])
    monkeypatch.setattr(machine, "time", clock)

    def busy(*seconds):
        rows = [f"cpu{core} {spent * tick} 0 0 900 7 0 0 0" for core, spent in enumerate(seconds)]
        stat.write_text("\n".join(["cpu 1 2 3", *rows, "intr 5"]))

    now = [0.0, 0.0]
    busy(1, 1, 1)
    load = machine.OtherLoad()
    assert load.cores() == 0.0  # no time has passed
    now[:] = 4.0, 3.0
    busy(4, 99, 4)  # core 1 is not ours; 3 of the 6 seconds are
    assert load.cores() == pytest.approx(0.75)
    stat.unlink()
    assert load.cores() == math.inf


@pytest.mark.parametrize(
    ("text", "gains"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 fma\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f\n", False),
        ("Features : fp asimd\n", False),
    ],
)
def test_the_processor_says_whether_bfloat16_products_are_fast(tmp_path, monkeypatch, text, gains):
    description = tmp_path / "cpuinfo"
    description.write_text(text)
    monkeypatch.setattr(machine, "_PROCESSOR", description)
    asked = machine.multiplies_bfloat16.__wrapped__
    assert asked("cpu") is gains
    assert not asked("meta")
    monkeypatch.setattr(machine, "_PROCESSOR", tmp_path / "absent")
    assert not asked("cpu")


def test_narrow_products_round_only_where_the_device_gains(monkeypatch):
    x = torch.randn(3, 5)
    for gains, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda kind, gains=gains: gains)
        with machine.narrow_products(x.device):
            assert (x @ x.T).dtype == dtype


@pytest.mark.parametrize(
    "text", ["processor : 0\nflags : fpu avx2\nbugs : none\n", "processor : 0\nFeatures : fp asimd\n"]
)
def test_instructions_are_the_line_of_linux_that_has_them(tmp_path, monkeypatch, text):
    description = tmp_path / "cpuinfo"
    description.write_text(text)
    monkeypatch.setattr(machine, "_PROCESSOR", description)
    assert machine.instructions() == text.splitlines()[1]
    monkeypatch.setattr(machine, "_PROCESSOR", tmp_path / "absent")
    assert machine.instructions()
