"""Order of the tests, and caches of one run: fresh, shared by all workers, gone afterwards; the user's own stay untouched."""

import contextlib
import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from support.forked import IMPORTED

# Tests never assert on time: the first call of an operator may build a kernel.
settings.register_profile("dbf", deadline=None)
settings.register_profile("few", deadline=None, max_examples=10)
settings.load_profile("dbf")
_IS_CONTROLLER = "DBF_TEST_FOLDER" not in os.environ  # workers inherit it
if _IS_CONTROLLER:
    os.environ["DBF_TEST_FOLDER"] = tempfile.mkdtemp(prefix="dbf_compile_tests_")
_FOLDER = Path(os.environ["DBF_TEST_FOLDER"])

# Hundreds of processes import the same modules. Where caches of bytecode are stale and must not be written, each of them
# compiles 800 modules again, for three seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Set before torch reads them, here and in every process that a test starts.
# Idle threads sleep. By default they spin for a while, which takes the core from another worker of the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A worker has one core; what tests threads sets their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DBF_CACHE_DIR"] = str(_FOLDER / "dbf")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_FOLDER / "inductor")
# Hundreds of kernels are compiled. Every process that compiles first tries, with six programs, whether the compiler knows
# what the processor can do: a second of processor time for each.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# A fifth of compiling a small kernel is linking it with the libraries of torch; gold takes a third of the time.
if _IS_CONTROLLER and (_linker := shutil.which("ld.gold")):
    (_FOLDER / "linker").mkdir()
    (_FOLDER / "linker" / "ld").symlink_to(_linker)
    os.environ.setdefault("COMPILER_PATH", str(_FOLDER / "linker"))


# Files of more than 20 seconds, the longest first.
LONGEST = (
    "compiler/test_lowerings.py",
    "end_to_end/test_compress.py",
    "end_to_end/test_architectures.py",
    "kernels/test_cpp_build_products.py",
    "end_to_end/test_transformers.py",
    "end_to_end/test_gpu_architectures.py",
    "end_to_end/test_benchmarks.py",
    "factorizer/test_factorize_quality.py",
    "end_to_end/test_devices.py",
    "end_to_end/test_processes.py",
    "end_to_end/test_cluster.py",
    "compiler/test_backend.py",
    "kernels/sign_matmul/test_triton_kernel.py",
    "integrations/test_transformers.py",
    "test_cli.py",
    "compiler/test_backend_sizes.py",
    "compiler/test_graph_weights.py",
    "end_to_end/test_packaging.py",
    "end_to_end/test_examples.py",
    "kernels/sign_matmul/test_triton_kernel_sass.py",
)


def pytest_collection_modifyitems(config, items):
    """Put the longest files first, then those of the most slow tests: the last ones are short, and all workers end together.

    For coverage each test is run once, with its first arguments: tracing costs a third of what a test takes without it.
    """
    if config.pluginmanager.hasplugin("_cov"):
        first = {(item.path, getattr(item, "originalname", item.name)): item for item in reversed(items)}
        items[:] = reversed(first.values())
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path, len(LONGEST)), -slow[item.path]))


def pytest_collection_finish(session):
    """Look for garbage less often, and never again among modules: it took a twelfth of the processor's time.

    A worker imports these sooner or later.
    """
    if hasattr(session.config, "workerinput"):
        for name in IMPORTED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()
    gc.set_threshold(10_000)


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
