"""A process reuses what an earlier one computed and compiled, unless the package was edited in between."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.forked import Forked
from support.models.tiny import error_of

import dbf_compile

pytestmark = pytest.mark.slow
PACKAGE = Path(dbf_compile.__file__).parent

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from support.models.tiny import MLP, OPTIONS, randn

from dbf_compile.compression import jobs

factored = []
factorize_batch = jobs.factorize_batch
jobs.factorize_batch = lambda *args, **kwargs: factored.append(1) or factorize_batch(*args, **kwargs)

scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
model, x = MLP(), randn(5, 67)
model.up.weight.mul_(scale)
before = "dbf_compile.compiler.backend" in sys.modules
y = torch.compile(model, backend="dbf", options=OPTIONS)(x)
hits = {name: counters[part][name] for part, name in (
    ("inductor", "fxgraph_cache_hit"), ("inductor", "fxgraph_cache_miss"), ("aot_autograd", "autograd_cache_hit"),
    ("aot_autograd", "autograd_cache_miss"), ("aot_autograd", "autograd_cache_bypass"))}
print(json.dumps({"y": y.double().tolist(), "factored": len(factored), "imported before": before,
                  "package": sys.modules["dbf_compile"].__file__, **hits}))
"""


def process(folder, *arguments):
    """Run the script with the package and the caches in ``folder``; return what it prints."""
    caches = {"DBF_CACHE_DIR": str(folder / "dbf"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = Forked(
        SCRIPT, *arguments, environment={**os.environ, **caches}, folder=folder, paths=(folder,)
    ).wait()
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert Path(results.pop("package")).parent.parent == folder
    return results


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A copy of the package, and the caches that its first process left; with what that process printed."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copytree(PACKAGE, folder / "dbf_compile", symlinks=False)
    return folder, process(folder)


@pytest.fixture
def again(used, tmp_path):
    """Copies of the package and the caches, which a test may change."""
    shutil.copytree(used[0], tmp_path / "again")
    return tmp_path / "again"


def test_a_second_process_factors_nothing_and_hits_inductors_caches(used, again):
    _, first = used
    second = process(again)
    assert not first["imported before"]  # the entry point alone found the backend
    assert first["factored"] == 2 and second["factored"] == 0
    assert first["autograd_cache_miss"] == 1
    assert second["autograd_cache_hit"] == 1  # so a copy of the package hits, unless it is edited
    assert (
        second["autograd_cache_miss"] == second["fxgraph_cache_miss"] == second["autograd_cache_bypass"] == 0
    )
    assert second["y"] == first["y"]


def test_changed_factors_miss_inductors_caches(again):
    changed = process(again, "1.5")
    assert changed["factored"] == 1
    assert changed["autograd_cache_hit"] == 0 and changed["autograd_cache_miss"] == 1


def test_an_edited_lowering_is_seen_by_the_next_process(used, again):
    # Let every layer come out doubled.
    lowerings = again / "dbf_compile" / "compiler" / "lowerings.py"
    lowerings.write_text(
        lowerings.read_text()
        + """
from torch._inductor import lowering as _lowering
_unedited = double_binary_linear
def double_binary_linear(*operands):
    return _lowering.lowerings[torch.ops.aten.mul.Tensor](_unedited(*operands), 2.0)
"""
    )
    edited = process(again)
    assert edited["autograd_cache_hit"] == 0
    before, after = (torch.tensor(result["y"]) for result in (used[1], edited))
    assert error_of(after, before) > 0.1


def test_an_edited_kernel_is_built_and_used_by_the_next_process(used, again):
    kernel = again / "dbf_compile" / "kernels" / "sign_matmul" / "cpu_kernel.cpp"
    kernel.write_text(kernel.read_text() + "\n// another version\n")
    edited = process(again)
    assert edited["autograd_cache_hit"] == 0
    assert len(list((again / "dbf" / "native").glob("*.so"))) == 2
    assert edited["y"] == used[1]["y"]
