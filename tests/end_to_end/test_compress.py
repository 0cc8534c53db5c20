"""``compress`` as users run it: killed and resumed, in several processes, with little memory, on damaged files."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.forked import Forked
from support.models.pretrained import FAST, text_of, tiny_folder, weights_of
from support.models.tiny import tiny_llama

transformers = pytest.importorskip("transformers")

import dbf_compile  # noqa: E402
from dbf_compile.errors import CheckpointError, ConversionError, OptionError, ResumeError  # noqa: E402

RUN = """
import json, sys
import dbf_compile
model, output, options = json.loads(sys.argv[1])
dbf_compile.compress(model, output, **options)
"""


def start(model, output, before="", **options):
    return Forked(before + RUN, json.dumps([str(model), str(output), {**FAST, **options}]))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


def compress(dense, output, **options):
    return dbf_compile.compress(dense, output, **{**FAST, "data": text_of(dense), **options})


@pytest.fixture(scope="module")
def independent(dense, tmp_path_factory):
    return compress(dense, tmp_path_factory.mktemp("independent") / "made", mode="independent")


@pytest.fixture(scope="module")
def sequential(dense, tmp_path_factory):
    return compress(dense, tmp_path_factory.mktemp("sequential") / "made", mode="sequential")


@pytest.fixture(params=["independent", "sequential"])
def mode(request):
    return request.param


@pytest.fixture
def expected(request, mode):
    """The folder that an undisturbed run of ``mode`` writes."""
    return request.getfixturevalue(mode).folder


def test_the_report_says_what_was_done(dense, mode, expected):
    report = json.loads((expected / "dbf_report.json").read_text())
    assert report["model"]["architecture"] == "LlamaForCausalLM" and report["settings"]["mode"] == mode
    assert report["data"] == {**report["data"], "windows": 8, "tokens": 8 * 16}
    assert 3.0 < report["bits"]["factored"] <= 4.0 < report["bits"]["file"]
    size = sum(path.stat().st_size for path in expected.glob("*.safetensors"))
    assert report["bits"]["file"] == pytest.approx(8 * size / report["model"]["parameters"])
    assert len(report["layers"]) == 2 * 4 and {row["block"] for row in report["layers"]} == {0, 1}
    assert all(0 < row["error"] < 1 for row in report["layers"])
    assert {"kl", "dense", "compressed"} <= report["evaluation"].keys()
    stages = [stage["stage"] for stage in report["stages"]]
    assert stages == ((["tune", "factor"] * 4 + ["refine"]) * 2 if mode == "sequential" else []) + ["distill"]
    assert "<html" in (expected / "dbf_report.html").read_text()
    assert not expected.with_name("made.work").exists()
    assert {path.name for path in expected.iterdir()} >= {"tokenizer.json", "generation_config.json"}


def test_the_summary_reads_well(independent):
    assert re.search(r"\d\.\d+ bits per weight in \d+\.\d% of the weights.*\n.*KL", str(independent))


def test_one_command_twice_does_nothing_the_second_time(dense, independent, monkeypatch):
    monkeypatch.setattr(dbf_compile.run.compress, "Work", lambda *_: pytest.fail("work was begun"))
    assert compress(dense, independent.folder, mode="independent").report == independent.report
    with pytest.raises(OptionError, match=r"which exists"):
        compress(dense, independent.folder, mode="independent", bits=3.0)


def test_blocks_of_an_earlier_run_count_as_done(dense, tmp_path, capsys):
    made = compress(dense, tmp_path / "made", mode="sequential", keep_work=True)
    shutil.rmtree(made.folder)
    (tmp_path / "made.work" / "model.layers.1.safetensors").unlink()
    compress(dense, tmp_path / "made", mode="sequential", progress=True)
    assert re.search(r"blocks: 100%", capsys.readouterr().err)


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_and_writes_the_same_files(dense, mode, expected, tmp_path):
    output, draw, kills = tmp_path / "made", random.Random(0), 0
    work = output.with_name("made.work")
    while kills < 5:
        process = start(dense, output, data=str(text_of(dense)), mode=mode)
        while not work.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.6))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        if output.exists():  # it ended before it was killed
            assert weights_of(output) == weights_of(expected)
            shutil.rmtree(output)
    done = start(dense, output, data=str(text_of(dense)), mode=mode).wait()
    assert done.returncode == 0, done.stderr
    assert weights_of(output) == weights_of(expected)
    assert not work.exists()


@pytest.mark.slow
def test_processes_that_share_the_work_write_the_same_files(dense, sequential, tmp_path):
    from dbf_compile.run.workers import compress_in_processes

    # Ranks of torchrun share independent work, in test_cluster.py.
    options = {**FAST, "data": str(text_of(dense)), "mode": "sequential"}
    made = compress_in_processes(dense, tmp_path / "made", processes=2, **options)
    assert weights_of(made.folder) == weights_of(sequential.folder)


def test_a_model_in_memory_gives_the_same_and_is_left_alone(dense, independent, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    made = compress_model(model, tmp_path / "made", text_of(dense), tokenizer)
    name = "model.safetensors"
    assert (made.folder / name).read_bytes() == (independent.folder / name).read_bytes()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    transformers.AutoTokenizer.from_pretrained(made.folder)


def compress_model(model, output, data, tokenizer):
    options = {**FAST, "mode": "independent"}
    return dbf_compile.compress(model, output, data=data, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("change", ["model", "data", "settings"])
def test_work_of_another_model_data_or_settings_is_refused_and_kept(dense, tmp_path, change):
    copied = tmp_path / "dense"
    shutil.copytree(dense, copied)
    text = shutil.copy(text_of(dense), text_of(copied))
    output, bits = tmp_path / "made", 4.0
    made = compress(copied, output, mode="independent", keep_work=True)
    shutil.rmtree(made.folder)
    work = tmp_path / "made.work"
    before = sorted(path.name for path in work.iterdir())
    if change == "model":
        tiny_llama(layers=1).save_pretrained(copied)
    elif change == "data":
        Path(text).write_text("other " * 200)
    else:
        bits = 3.0
    with pytest.raises(ResumeError, match=f"other .*{change}"):
        compress(copied, output, mode="independent", bits=bits)
    assert sorted(path.name for path in work.iterdir()) == before
    compress(copied, output, mode="independent", bits=bits, resume="never")
    assert output.exists()


def test_a_damaged_shard_is_an_error_that_names_the_folder(dense, tmp_path):
    copied = tmp_path / "dense"
    shutil.copytree(dense, copied)
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"dense.*(damaged|cannot be loaded)"):
        dbf_compile.compress(copied, tmp_path / "made", **FAST)
    assert not (tmp_path / "made").exists()


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so writing past the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
"""


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(dense, independent, tmp_path):
    full = FULL.replace("ROOM", "30000")  # enough for some results, not for the largest
    done = start(dense, tmp_path / "made", full, data=str(text_of(dense)), mode="independent").wait()
    assert done.returncode != 0
    assert re.search(r"CheckpointError: writing .* failed .*make room", done.stderr), done.stderr[-2000:]
    assert not (tmp_path / "made").exists()
    assert any((tmp_path / "made.work").glob("*.safetensors"))
    made = compress(dense, tmp_path / "made", mode="independent", resume="required")
    assert weights_of(made.folder) == weights_of(independent.folder)


MEMORY = """
import json, resource, sys, threading, time
import dbf_compile, transformers, torch
from pathlib import Path

def now(*kinds):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[kind].split()[0]) * 1024 for kind in kinds]

peaks, ready = [0, 0], threading.Event()
def watch():
    while not ready.is_set():
        peaks[:] = map(max, peaks, now("RssAnon", "VmData"))
        time.sleep(0.001)  # a peak lasts a few milliseconds: at 10 it is missed in one run of three

model, output, options, limit = json.loads(sys.argv[1])
torch.randn(64, 64) @ torch.randn(64, 64)
before = now("RssAnon", "VmData")
if limit is not None:
    resource.setrlimit(resource.RLIMIT_DATA, (before[1] + limit,) * 2)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
dbf_compile.compress(model, output, **options)
ready.set()
thread.join()
print(json.dumps([peak - start for peak, start in zip(peaks, before)]))
"""


# glibc returns freed memory to the system at once; by default it keeps an amount that differs from run to run.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_depends_on_the_largest_block_and_not_on_the_model(tmp_path):
    """A model of five times as many blocks needs little more memory, and less than its weights take.

    The limit is RLIMIT_DATA, which counts writable mappings of files. So the weights count once, as a file, and a copy of
    them would not fit.
    """

    private, limit = {}, None
    for layers in (2, 10):
        model = tiny_llama(layers, hidden_size=384, intermediate_size=768, num_key_value_heads=4)
        dense = tiny_folder(tmp_path / f"dense{layers}", model=model)
        block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
        total = sum(p.numel() * 4 for p in model.parameters())
        options = {**FAST, "data": str(text_of(dense)), "mode": "sequential", "windows": 2, "holdout": 0}
        options |= {"bits": 0.25, "iterations": 1, "distill": 0, "max_shard_size": 2**20, "preset": "fast"}
        arguments = json.dumps([str(dense), str(tmp_path / f"made{layers}"), options, limit])
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, arguments],
            env={**os.environ, **RETURNED},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        private[layers], data = json.loads(done.stdout.splitlines()[-1])
        limit = data + 8 * block + 8 * block // 4  # of the larger model: its file and a quarter of it
    # No weight of the 8 additional blocks may stay in memory.
    assert private[10] - private[2] < 8 * block / 4 < total / 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "block", "data": None}, OptionError, "mode='sequential' without data"),
        ({"batches": [torch.ones(1, 4).long()]}, OptionError, "data and batches"),
        ({"resume": "maybe"}, OptionError, "resume='maybe'"),
        ({"temperr": 1}, OptionError, "unknown option 'temperr'.*did you mean 'temper'"),
        ({"tune": -1}, OptionError, "tune=-1"),
        ({"budget": "some"}, OptionError, "budget='some'"),
        ({"temper": 2.0}, OptionError, "temper=2.0"),
        ({"length": 10**6}, OptionError, "length=1000000"),
        ({"data": ["few words"]}, ConversionError, "source of"),
        ({"skip": ["*nosuch"]}, OptionError, "skip: .*nosuch' matches no layer"),
        ({"overrides": {"*nosuch": 3.0}}, OptionError, "overrides: .*nosuch' matches no layer"),
        ({"skip": ["*"]}, ConversionError, "without a linear layer to factor"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(dense, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        compress(dense, tmp_path / "made", **options)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(dense, tmp_path):
    with pytest.raises(OptionError, match="parent is no folder"):
        compress(dense, tmp_path / "no" / "made")


def test_modules_that_are_not_of_transformers_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="convert_"):
        dbf_compile.compress(torch.nn.Linear(64, 64), tmp_path / "made")


def test_a_model_of_which_little_is_factored_gives_a_warning(dense, tmp_path):
    with pytest.warns(UserWarning, match=r"only \d+% of the weights are factored.*\(skipped by name\)"):
        compress(dense, tmp_path / "made", mode="independent", skip=["*mlp*", "*lm_head"], distill=0)


def test_without_data_the_model_writes_text_itself(dense, tmp_path):
    result = compress(dense, tmp_path / "made", data=None, own_text=None)
    data, settings = result.report["data"], result.report["settings"]
    assert data["kinds"] == {
        "own text": {"source": "written by the model itself", "windows": 8, "tokens": 8 * 16}
    }
    assert settings["mode"] == "sequential" and result.report["evaluation"]["kl"] > 0
    assert result.report["time"]["write"] > 0 and "one kind of text alone" not in str(result)


def test_without_data_and_text_of_its_own_random_tokens_are_used(dense, tmp_path):
    result = compress(dense, tmp_path / "made", data=None)
    data, settings = result.report["data"], result.report["settings"]
    assert data["source"] == "random tokens" and settings["mode"] == "independent"
    assert result.report["evaluation"] in ({}, None)


def test_allocated_budgets_and_kronecker_curvature(dense, tmp_path):
    made = compress(dense, tmp_path / "made", budget="allocated", form="kronecker", temper=0.5, bits=3.0)
    sizes = {row["mid_features"] / row["bits_per_weight"] for row in made.report["layers"]}
    assert len(sizes) > 2 and made.report["bits"]["factored"] <= 3.0
    transformers.AutoModelForCausalLM.from_pretrained(made.folder)
