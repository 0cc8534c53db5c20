"""The first use of the backend may come in many threads at once, and it may come before the package is imported."""

import subprocess
import sys

import pytest
from support.forked import Forked

from dbf_compile.compiler import registration

FIRST_USE = """
import sys, threading, torch
exec(sys.argv[1])
errors, start = [], threading.Barrier(int(sys.argv[2]))
def work():
    start.wait()
    try:
        torch.compile(torch.nn.Linear(3, 3), backend="dbf")
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work) for _ in range(start.parties)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
torch.compiler.reset()
raise SystemExit(repr(errors) if errors else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "threads"), [("import dbf_compile", 8), ("pass", 1)])
def test_first_use(before, threads):
    command = [sys.executable, "-c", FIRST_USE, before, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "threads"),
    [("import dbf_compile", 8), ("torch._dynamo.list_backends(); import dbf_compile", 1)],
)
def test_first_use_where_dynamo_is_imported_already(before, threads):
    done = Forked(FIRST_USE, before, threads).wait()
    assert done.returncode == 0, done.stderr


def test_a_release_of_torch_that_tells_nothing_of_frames_is_named(monkeypatch, caplog):
    from torch._dynamo.symbolic_convert import InstructionTranslator

    monkeypatch.delattr(InstructionTranslator, "_throw_if_in_functorch", raising=False)
    registration.watch_frames()
    assert not hasattr(InstructionTranslator, "_throw_if_in_functorch")
    assert "does not say what it is about to trace" in caplog.text
