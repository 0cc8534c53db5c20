"""Durable results: made once, by one, whole or not at all, and only for what they were begun for."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import filelock
import pytest
from support.strategies import random_factors

from dbf_compile.errors import CheckpointError, ResumeError
from dbf_compile.run.work import Work

FINGERPRINT = {"model": "m", "data": "d", "settings": {"bits": 2.0}}


def made(seed=0):
    return {"layer": random_factors(33, 7, 20, seed=seed)}, {"error": 0.5}


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path / "work", FINGERPRINT)


def test_a_result_is_made_once_and_read_by_whoever_asks(work, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return made()

    factors, facts = work.factors("a", make)
    again, facts_again = Work(tmp_path / "work", FINGERPRINT).factors("a", make)
    assert len(calls) == 1 and facts == facts_again == {"error": 0.5}
    assert all(
        map(
            lambda x, y: (x == y).all(),
            factors["layer"].tensors().values(),
            again["layer"].tensors().values(),
        )
    )


def test_a_result_that_fails_leaves_nothing_and_is_made_by_the_next(work):
    def fail():
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        work.factors("a", fail)
    assert not work.has("a")
    assert work.factors("a", made)[1] == {"error": 0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "n"}, "with another model;"),
        ({"data": "e", "model": "n"}, "with another model, another data;"),
        ({"settings": {"bits": 1.0, "seed": 0}}, "with other settings (bits=2.0 instead of 1.0, seed='nothing' instead of 0);"),
        ({"program": "p"}, "with another program;"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_a_run_with_other_inputs_is_refused_and_says_which(work, tmp_path, change, words):
    with pytest.raises(ResumeError, match=re.escape(words)):
        Work(tmp_path / "work", FINGERPRINT | change)


def test_work_in_progress_is_not_removed(work, tmp_path):
    work.factors("a", made)
    with work.exclusive("b"), pytest.raises(ResumeError, match="another process is at work"):
        Work(tmp_path / "work", FINGERPRINT, "never")
    assert work.has("a")
    assert not Work(tmp_path / "work", FINGERPRINT, "never").has("a")


def test_an_unfinished_folder_of_a_killed_run_is_removed(work):
    folder = work.new_folder("model")
    (folder / "half").touch()
    assert not any(work.new_folder("model").iterdir())
    work.remove()
    assert not folder.parent.exists()


def test_an_unfinished_folder_of_a_machine_whose_locks_are_not_seen_is_not_moved_into_place(work, tmp_path):
    mine, other = work.new_folder("model"), work.new_folder("model")
    (other / "half").touch()
    with pytest.raises(FileNotFoundError):
        mine.rename(tmp_path / "model")
    assert mine.name == other.name == "model"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_refused_before_any_work(tmp_path, monkeypatch, number):
    def no_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_lock)
    with pytest.raises(CheckpointError, match="file system without locks"):
        Work(tmp_path / "work", FINGERPRINT)
    assert list((tmp_path / "work").rglob("*.safetensors")) == []


def test_a_lock_that_fails_for_another_reason_says_so(work, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EPERM, "denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", denied)
    with pytest.raises(PermissionError, match="denied"):
        work.factors("a", made)


@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["empty", "other", "cut"])
@pytest.mark.parametrize("name", ["a.safetensors", "allocation.json"])
def test_a_damaged_result_is_made_again_by_the_next_run(work, tmp_path, name, damage, caplog):
    work.factors("a", made)
    work.once("allocation.json", lambda path: path.write_text('{"a": 1}'))
    path = work.folder / name
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    again = Work(tmp_path / "work", FINGERPRINT)
    assert f"{name} is damaged" in caplog.text and not path.exists()
    assert {entry.name for entry in again.folder.iterdir()} == {
        "manifest.json",
        "locks",
        *({"a.safetensors", "allocation.json"} - {name}),
    }
    assert again.factors("a", lambda: made(1))[1] == {"error": 0.5}


def test_a_result_with_a_flipped_bit_is_made_again(work, tmp_path, caplog):
    work.factors("a", made)
    path = work.folder / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Work(tmp_path / "work", FINGERPRINT)
    assert "a.safetensors is damaged" in caplog.text and not path.exists()


@pytest.mark.parametrize("key", FINGERPRINT)
def test_work_for_something_else_is_refused_and_left_alone(work, tmp_path, key):
    work.factors("a", made)
    with pytest.raises(ResumeError, match=f"another {key}.*'never'"):
        Work(tmp_path / "work", {**FINGERPRINT, key: "other"})
    assert work.has("a")


def test_required_work_is_there_or_refused(tmp_path):
    with pytest.raises(ResumeError, match="no interrupted run"):
        Work(tmp_path / "none", FINGERPRINT, "required")
    assert not (tmp_path / "none").exists()
    Work(tmp_path / "some", FINGERPRINT).factors("a", made)
    assert Work(tmp_path / "some", FINGERPRINT, "required").has("a")


def test_never_starts_over(work, tmp_path):
    work.factors("a", made)
    assert not Work(tmp_path / "work", {**FINGERPRINT, "model": "other"}, "never").has("a")


def test_an_unreadable_manifest_says_so(work, tmp_path):
    (work.folder / "manifest.json").write_text("{")
    with pytest.raises(ResumeError, match="unreadable"):
        Work(tmp_path / "work", FINGERPRINT)


def test_threads_share_names_without_making_any_twice(work):
    names, calls, lock = [f"r{n}" for n in range(12)], [], threading.Lock()

    def make_all():
        for name in names:
            with work.claim([name]) as claimed:
                if claimed:
                    with lock:
                        calls.append(name)
                    time.sleep(0.01)
                    work.put(name, *made())

    threads = [threading.Thread(target=make_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == sorted(names) and all(map(work.has, names))


HOLD = f"""
import sys, time
from pathlib import Path
from dbf_compile.run.work import Work

def make():
    Path(sys.argv[2]).touch()
    time.sleep(60)

Work(Path(sys.argv[1]), {FINGERPRINT}).factors("a", make)
"""


def test_what_a_killed_process_was_making_is_made_by_another(work, tmp_path):
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(work.folder), str(started)])
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert not work.has("a")
    process.kill()
    process.wait()
    with work.claim(["a"]) as claimed:
        work.put(*claimed, *made())
    assert work.has("a")


def test_the_manifest_holds_what_results_depend_on(work):
    assert json.loads((work.folder / "manifest.json").read_text()) == FINGERPRINT


def test_once_writes_other_files(work):
    path = work.once("allocation.json", lambda path: path.write_text("{}"))
    assert path.read_text() == "{}"
    work.once("allocation.json", lambda path: pytest.fail("made twice"))


def test_remove_removes_all(work):
    work.factors("a", made)
    work.remove()
    assert not work.folder.exists()
