"""Workers beyond one machine: ranks of torchrun and tasks of Ray share a run, one of them is killed, and the files are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from support.models.pretrained import FAST, text_of, tiny_folder, weights_of

import dbf_compile
from dbf_compile.run.workers import compress_on_ray

pytestmark = pytest.mark.slow

# A module for workers: the first one that has factored two weights is killed while it factors its third.
KILLED = """
import os, signal
from dbf_compile.compression import jobs

factorize_batch, begun = jobs.factorize_batch, []

def killed_once(*arguments, **keywords):
    begun.append(1)
    if len(begun) == 3:
        try:
            os.close(os.open({flag!r}, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return factorize_batch(*arguments, **keywords)

def patch():
    jobs.factorize_batch = killed_once
"""
RANK = """
import json, sys
import dbf_compile, killed
killed.patch()
model, output, options = json.loads(sys.argv[1])
dbf_compile.compress(model, output, **options)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def options(dense):
    return {**FAST, "data": str(text_of(dense)), "mode": "independent"}


@pytest.fixture(scope="module")
def expected(dense, options, tmp_path_factory):
    """The files that one undisturbed process writes."""
    return weights_of(
        dbf_compile.compress(dense, tmp_path_factory.mktemp("alone") / "made", **options).folder
    )


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """Where a worker leaves a file before it is killed; beside the module that does it, which workers find."""
    flag = tmp_path / "worker-was-killed"
    (tmp_path / "killed.py").write_text(KILLED.format(flag=str(flag)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    return flag


def test_a_rank_of_torchrun_is_killed_and_all_are_started_again(dense, options, expected, flag, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "--max-restarts=1", "rank.py", json.dumps([str(dense), "made", options])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert flag.exists() and weights_of(tmp_path / "made") == expected


def test_a_task_of_ray_is_killed_and_the_others_go_on(dense, options, expected, flag, tmp_path):
    ray = pytest.importorskip("ray")
    paths = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    environment = {"worker_process_setup_hook": "killed.patch", "env_vars": paths}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        made = compress_on_ray(dense, "made", tasks=2, **options)
    finally:
        ray.shutdown()
    assert made.folder == tmp_path / "made" and not Path("made.work").exists()
    assert flag.exists() and weights_of(made.folder) == expected
