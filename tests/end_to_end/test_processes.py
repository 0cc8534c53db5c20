"""What one process made, the next one finds; what was edited in between, it does not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import dbf_compile

PACKAGE = Path(dbf_compile.__file__).parent

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from support.models.tiny import MLP, OPTIONS, randn

made = []
def watch(*args, **kwargs):
    from dbf_compile.compression import jobs
    original = jobs.factorize_batch
    jobs.factorize_batch = lambda *args, **kwargs: made.append(1) or original(*args, **kwargs)
watch()

scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
model, x = MLP(), randn(5, 67)
model.up.weight.mul_(scale)
before = "dbf_compile.compiler.backend" in sys.modules
y = torch.compile(model, backend="dbf", options=OPTIONS)(x)
hits = {name: counters[part][name] for part, name in (
    ("inductor", "fxgraph_cache_hit"), ("inductor", "fxgraph_cache_miss"), ("aot_autograd", "autograd_cache_hit"),
    ("aot_autograd", "autograd_cache_miss"), ("aot_autograd", "autograd_cache_bypass"))}
print(json.dumps({"y": y.double().tolist(), "factored": len(made), "imported before": before, **hits}))
"""


def process(tmp_path, *arguments, package=None):
    path = os.pathsep.join(str(item) for item in (package, Path(__file__).parents[1]) if item is not None)
    environment = {
        **os.environ,
        "DBF_CACHE_DIR": str(tmp_path / "dbf"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_factors_nothing_and_hits_inductors_caches(tmp_path):
    first, second = process(tmp_path), process(tmp_path)
    assert not first["imported before"]  # the entry point alone found the backend
    assert first["factored"] == 2 and second["factored"] == 0
    assert first["autograd_cache_miss"] == 1
    assert second["autograd_cache_hit"] == 1
    assert (
        second["autograd_cache_miss"] == second["fxgraph_cache_miss"] == second["autograd_cache_bypass"] == 0
    )
    assert second["y"] == first["y"]


def test_changed_factors_miss_inductors_caches(tmp_path):
    process(tmp_path)
    changed = process(tmp_path, "1.5")
    assert changed["factored"] == 1
    assert changed["autograd_cache_hit"] == 0 and changed["autograd_cache_miss"] == 1


def test_an_edited_lowering_is_seen_by_the_next_process(tmp_path):
    copy = tmp_path / "package"
    shutil.copytree(PACKAGE, copy / "dbf_compile", symlinks=False)
    first = process(tmp_path, package=copy)
    again = process(tmp_path, package=copy)
    assert again["autograd_cache_hit"] == 1 and again["y"] == first["y"]

    # Let every layer come out doubled.
    lowerings = copy / "dbf_compile" / "lowerings.py"
    lowerings.write_text(
        lowerings.read_text()
        + """
from torch._inductor import lowering as _lowering
_unedited = double_binary_linear
def double_binary_linear(*operands):
    return _lowering.lowerings[torch.ops.aten.mul.Tensor](_unedited(*operands), 2.0)
"""
    )
    edited = process(tmp_path, package=copy)
    assert edited["autograd_cache_hit"] == 0
    largest = max(abs(value) for row in first["y"] for value in row)
    difference = max(
        abs(a - b)
        for one, other in zip(edited["y"], first["y"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert difference > 0.1 * largest


def test_an_edited_kernel_is_built_and_used_by_the_next_process(tmp_path):
    copy = tmp_path / "package"
    shutil.copytree(PACKAGE, copy / "dbf_compile", symlinks=False)
    first = process(tmp_path, package=copy)
    kernel = copy / "dbf_compile" / "kernels" / "sign_matmul" / "cpu_kernel.cpp"
    kernel.write_text(kernel.read_text() + "\n// another version\n")
    edited = process(tmp_path, package=copy)
    assert edited["autograd_cache_hit"] == 0
    assert len(list((tmp_path / "dbf" / "native").glob("*.so"))) == 2
    assert edited["y"] == first["y"]
