"""The benchmarks for GPUs run from end to end on the CPU, with small sizes, else a mistake shows only on a GPU; so do campaigns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLES = {
    "bench_gpu.py": ["gpu_layer", "gpu_decode"],
    "tune_gpu.py": ["gpu_tuning"],
    "one_launch.py": ["gpu_one_launch"],
}


def results() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program from its own folder, as a user does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


@pytest.mark.parametrize("program", TABLES)
def test_a_dry_run_ends_and_writes_nothing(program: str) -> None:
    before = results()
    done = run(program, "--dry-run")
    assert done.returncode == 0, done.stderr[-4000:]
    for table in TABLES[program]:
        assert f"rows of {table} not written" in done.stdout
    assert results() == before


def test_campaigns_find_nothing_in_a_few_cases_and_write_nothing() -> None:
    """Those of the sanitizers and of kills are in ``test_cpp_build_products.py`` and ``test_compress.py``."""
    before = results()
    done = run("soak.py", "--quick", "folders", "threads")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "rows of soak not written" in done.stdout
    assert results() == before
