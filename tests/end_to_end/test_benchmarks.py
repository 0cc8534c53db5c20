"""The benchmarks for GPUs run from end to end on the CPU, with small sizes: else a mistake shows only on a GPU."""

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


@pytest.mark.parametrize("program", TABLES)
def test_a_dry_run_ends_and_writes_nothing(program: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    # From their own folder, as a user starts them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / program), "--dry-run"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for table in TABLES[program]:
        assert f"rows of {table} not written" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()} == before
