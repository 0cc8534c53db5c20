"""finetune: the folder gets nearer to the dense model and keeps its form, or stays as it was; runs go on with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models.compressed import SHORT, compressed_folder
from support.models.pretrained import tiny_tokenizer, weights_of

transformers = pytest.importorskip("transformers")

import dbf_compile  # noqa: E402
from dbf_compile.errors import OptionError, ResumeError  # noqa: E402
from dbf_compile.finetuning import training  # noqa: E402
from dbf_compile.finetuning.folders import is_better  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")  # not of the kernels, too, which all tests share
        patch.setattr("dbf_compile.finetuning.request.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return compressed_folder(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def result(start):
    return dbf_compile.finetune(**start, **SHORT)


def test_the_new_folder_is_nearer_to_the_dense_model(start, result):
    assert result.improved and result.folder == start["folder"].with_name("compressed-finetuned")
    assert result.after["kl"] < result.before["kl"] and result.course.flips > 0
    assert "KL from the dense model" in str(result)
    tokenizer, count = tiny_tokenizer(), SHORT["tokens"] // SHORT["length"]
    batches = dbf_compile.token_batches(start["data"]["words"], tokenizer, length=16, count=count + 3)
    behind = [torch.cat([batch["input_ids"][0] for batch in batches][count:]).tolist()]
    judged = dbf_compile.evaluate(
        result.folder, behind, dense=start["dense"], length=16, windows=3, progress=False
    )
    assert judged["kl"] == pytest.approx(result.after["kl"])


def test_bits_and_form_stay(start, result):
    before, after = (load_file(folder / "model.safetensors") for folder in (start["folder"], result.folder))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"signs_in", "signs_out", "scale_in", "scale_mid", "scale_out"} <= changed
    model = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.signs_in is attention.k_proj.signs_in  # a shared first stage stays one


def test_a_run_that_stops_goes_on_with_the_same_bits(start, result, monkeypatch):
    steps = training.Training._save
    saves = []

    def stop(run):
        steps(run)
        saves.append(run)
        if len(saves) == 2:
            raise KeyboardInterrupt

    output = start["folder"].with_name("stopped")
    monkeypatch.setattr(training.Training, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        dbf_compile.finetune(**start, output=output, **SHORT)
    monkeypatch.undo()
    assert not output.exists()
    again = dbf_compile.finetune(**start, output=output, **SHORT, resume="required")
    assert weights_of(again.folder) == weights_of(result.folder)
    assert again.course.judged == result.course.judged
    assert not output.with_name("stopped.work").exists()


def test_two_runs_of_one_output_do_not_meet(start, monkeypatch):
    output = start["folder"].with_name("taken")
    judge = training.Training._judge

    def begin_another(run):
        monkeypatch.setattr(training.Training, "_judge", judge)
        for resume in ("auto", "never"):
            with pytest.raises(ResumeError, match="another process is at work"):
                dbf_compile.finetune(**start, output=output, **SHORT, resume=resume)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "_judge", begin_another)
    with pytest.raises(KeyboardInterrupt):
        dbf_compile.finetune(**start, output=output, **SHORT)


def test_a_run_that_diverges_ends_early_and_nothing_is_written(start):
    output, rates = (
        start["folder"].with_name("spoiled"),
        {"scale_rate": 3.0, "sign_rate": 3.0, "norm_rate": 1.0},
    )
    with pytest.warns(UserWarning, match="finetuning diverges: after 10 of 20 steps"):
        worse = dbf_compile.finetune(**start, output=output, **(SHORT | rates))
    assert not worse.improved and worse.folder == start["folder"] and not output.exists()
    assert "stays as it was" in str(worse)


def test_nothing_is_written_where_nothing_gets_better(start):
    output = start["folder"].with_name("unchanged")
    rates = {"scale_rate": 0.0, "sign_rate": 0.0, "norm_rate": 0.0}
    same = dbf_compile.finetune(**start, output=output, **(SHORT | rates))
    assert not same.improved and not output.exists()


def test_what_is_worse_for_one_kind_is_not_better():
    start = {"kl": 2.0, "kinds": {"web": {"kl": 1.0}, "code": {"kl": 3.0}}}
    assert is_better({"kl": 1.5, "kinds": {"web": {"kl": 1.0}, "code": {"kl": 2.0}}}, start)
    assert not is_better({"kl": 1.0, "kinds": {"web": {"kl": 1.1}, "code": {"kl": 0.9}}}, start)
    assert not is_better(start, start)


def test_without_data_it_learns_from_what_the_dense_model_writes(start):
    output, options = start["folder"].with_name("own"), {**SHORT, "sign_rate": 0.0}
    own = dbf_compile.finetune(start["folder"], dense=start["dense"], output=output, **options)
    assert own.improved and list(own.after["kinds"]) == ["own text"]


def test_scales_alone_leave_the_signs(start):
    output = start["folder"].with_name("scales")
    scales = dbf_compile.finetune(**start, output=output, **{**SHORT, "sign_rate": 0.0, "norm_rate": 0.0})
    assert scales.improved and scales.course.flips == 0


def test_an_output_that_exists_is_refused(start):
    with pytest.raises(OptionError, match="which exists"):
        dbf_compile.finetune(**start, output=start["folder"], **SHORT)


@pytest.mark.slow
def test_the_report_has_the_stage(tmp_path):
    from support.models.pretrained import FAST, text_of, tiny_folder

    dense = tiny_folder(tmp_path / "dense")
    start = dbf_compile.compress(dense, tmp_path / "start", mode="independent", **{**FAST, "bits": 2.0})
    assert start.report.model.source == str(dense)
    tuned = dbf_compile.finetune(start.folder, text_of(dense), **SHORT)  # the report names the dense model
    report = json.loads((tuned.folder / "dbf_report.json").read_text())
    assert (
        report["stages"][-1]["stage"] == "finetune" and "640 tokens of text" in report["stages"][-1]["what"]
    )
    assert report["stages"][-1]["after"] == pytest.approx(tuned.after["kl"])
    assert report["evaluation"]["kl"] == pytest.approx(tuned.after["kl"])
    assert "finetune" in (tuned.folder / "dbf_report.html").read_text()


@pytest.mark.slow
def test_two_processes_end_with_the_bits_of_one(start, monkeypatch):
    monkeypatch.setattr("dbf_compile.machine.cores", lambda: 1)  # as of the others: sums depend on it
    monkeypatch.setattr(
        "dbf_compile.finetuning.learner._KEPT", 1
    )  # each of the others has one window of a step
    alone = dbf_compile.finetune(**start, output=start["folder"].with_name("alone"), **{**SHORT, "batch": 2})
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [tests / "support" / "finetune_processes.py", start["folder"].parent]
    environment = {**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *program], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Two summands have one sum in any order.
    assert weights_of(start["folder"].with_name("together")) == weights_of(alone.folder)
    assert json.loads(done.stdout.splitlines()[-1])[1] == pytest.approx(alone.after["kl"])


def test_the_command_trains_a_folder(start):
    testing = pytest.importorskip("typer.testing")
    from dbf_compile import cli

    output = start["folder"].with_name("command")
    options = [
        part
        for name, value in SHORT.items()
        if name != "progress"
        for part in ("--" + name.replace("_", "-"), value)
    ]
    arguments = [
        "finetune",
        start["folder"],
        "-o",
        output,
        "--dense",
        start["dense"],
        "--no-progress",
        "--json",
    ]
    arguments += ["--data", f"words={start['data']['words']}", *options]
    done = testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["improved"] and facts["folder"] == str(output) and output.is_dir()
