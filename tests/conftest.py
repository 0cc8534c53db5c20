"""Caches of one test run: fresh, shared by all workers, gone afterwards; the user's own are neither read nor written."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

_IS_CONTROLLER = "DBF_TEST_FOLDER" not in os.environ  # workers inherit it
if _IS_CONTROLLER:
    os.environ["DBF_TEST_FOLDER"] = tempfile.mkdtemp(prefix="dbf_compile_tests_")
_FOLDER = Path(os.environ["DBF_TEST_FOLDER"])

# Before torch reads them, here and in every process that a test starts.
# Threads that have nothing to do sleep. By default they spin for a while, and with a worker of the tests on every core
# that is the time of others, for whom they wait in turn.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["DBF_CACHE_DIR"] = str(_FOLDER / "dbf")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_FOLDER / "inductor")


def pytest_sessionfinish(session):
    if _IS_CONTROLLER:
        shutil.rmtree(_FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Let no test see what another one compiled in this process."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()
