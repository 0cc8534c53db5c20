"""Processes of one machine: what goes to them, and what happens when they cannot run. That they work is tested end to end."""

import errno
import multiprocessing
import os
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
import torch

from dbf_compile.errors import CheckpointError, OptionError, ResumeError
from dbf_compile.run import workers
from dbf_compile.run.work import Work

BATCHES = [{"input_ids": torch.arange(6).view(1, 6)}, {"input_ids": torch.ones(1, 3, dtype=torch.long)}]


class Pool:
    """A pool of no processes that answers as told."""

    def __init__(self, _count, mp_context=None, initializer=None, *, start=None, result=None):
        self._result = result
        if start is not None:
            raise start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, *_):
        future = Future()
        future.set_exception(self._result)
        return future


def compress_in_two(monkeypatch, **answer):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", partial(Pool, **answer))
    workers.compress_in_processes("model", "output", processes=2, bits=2.0)


def test_tensors_go_to_a_process_without_shared_memory(monkeypatch):
    def no_shared_memory(*_):
        raise AssertionError("shared memory")

    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", no_shared_memory)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_shared_memory)
    arrived = workers._call(workers._packed(partial(_batches_of, batches=BATCHES)))
    assert all(
        torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(arrived, BATCHES, strict=True)
    )


def _batches_of(batches):
    return batches


def test_a_full_shared_memory_is_said(monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"/dev/shm.*processes=1"):
        compress_in_two(monkeypatch, start=full)


def test_a_process_that_is_killed_is_said(monkeypatch):
    with pytest.raises(ResumeError, match=r"ended from outside.*fewer processes"):
        compress_in_two(monkeypatch, result=BrokenProcessPool("abruptly"))


def test_an_error_of_a_process_stays_what_it_is(monkeypatch):
    with pytest.raises(FileNotFoundError):
        compress_in_two(monkeypatch, result=FileNotFoundError(Path("data")))


def _sleeper(ready, with_parent):
    if with_parent:
        workers._end_with_parent()
    ready.send(os.getpid())
    time.sleep(60)


def _parent_of_sleeper(ready):
    Process = multiprocessing.get_context("fork").Process
    Process(target=_sleeper, args=(ready, True)).start()
    time.sleep(60)


def _is_gone(number):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_process_ends_with_the_one_that_started_it():
    receiver, ready = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=_parent_of_sleeper, args=(ready,))
    parent.start()
    number = receiver.recv()
    parent.kill()
    parent.join()
    assert _is_gone(number)


def test_an_interruption_ends_the_processes_that_were_started():
    receiver, ready = multiprocessing.Pipe()
    with pytest.raises(KeyboardInterrupt), workers._ended_on_interrupt():
        multiprocessing.get_context("fork").Process(target=_sleeper, args=(ready, False)).start()
        number = receiver.recv()
        raise KeyboardInterrupt
    assert _is_gone(number)


def test_to_start_over_is_done_once_and_not_by_every_process(monkeypatch, tmp_path):
    work = Work(tmp_path / "output.work", {"model": "m"})
    calls = []
    monkeypatch.setattr(workers, "_packed", calls.append)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", partial(Pool, result=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        workers.compress_in_processes("model", tmp_path / "output", processes=2, resume="never")
    assert not work.folder.exists()
    assert [call.keywords["config"].resume for call in calls] == ["auto", "auto"]


@pytest.mark.parametrize("unfit", [(text for text in ["a"]), [lambda: 0]])
def test_what_cannot_be_sent_is_refused(unfit):
    with pytest.raises(OptionError, match="processes=1"):
        workers.compress_in_processes("model", "output", processes=2, bits=2.0, data=unfit)


@pytest.mark.parametrize(("call", "words"), [
    (partial(workers.compress_in_processes, processes=0), "processes=0"),
    (partial(workers.compress_on_ray, tasks=0), "tasks=0"),
])  # fmt: skip
def test_no_worker_at_all_is_refused(call, words):
    with pytest.raises(OptionError, match=f"{words}; allowed: 1 or more"):
        call("model", "output", bits=2.0)


def test_a_machine_that_sees_other_files_is_refused(tmp_path):
    mark = workers._begin(tmp_path / "output", start_over=False)
    call = partial(workers._where_marked, mark, folder=tmp_path, call=Path.cwd)
    assert call(tmp_path / "output") == tmp_path  # relative paths begin where the driver's do
    mark[0].unlink()
    with pytest.raises(OptionError, match=r"does not see what .* wrote beside it.*share"):
        call(tmp_path / "output")
    (tmp_path / "output").mkdir()  # a task that starts when another has ended
    assert call(tmp_path / "output") == tmp_path


def test_a_mark_is_left_where_work_is_to_be_done_alone(tmp_path):
    work = Work(tmp_path / "output.work", {"model": "m"})
    mark, _ = workers._begin(tmp_path / "output", start_over=True)
    assert [path.name for path in work.folder.iterdir()] == ["marks"] and mark.exists()
    Work(work.folder, {"model": "m"})  # it is no damaged result
    with pytest.raises(OptionError, match="no folder"):
        workers._begin(tmp_path / "none" / "output", start_over=False)
    done = tmp_path / "done"
    done.mkdir()
    (done / "dbf_report.json").touch()
    assert not workers._begin(done, start_over=False)[0].parent.parent.exists()
