"""The command line: what it prints, what it returns, what it leaves behind."""

import json
import signal
import subprocess
import sys
import time

import pytest
from support.models.pretrained import FAST, text_of, tiny_folder

pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner

from dbf_compile import cli
from dbf_compile.cli_options import parse_settings
from dbf_compile.counters import Meter
from dbf_compile.errors import DBFError, OptionError

SETTINGS = ["--windows", "8", "--length", "16", "--no-progress"]
for option in ("iterations", "holdout", "tune", "refine", "distill"):
    SETTINGS += ["--set", f"{option}={FAST[option]}"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def facts(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("cli") / "dense", layers=1)


@pytest.fixture(scope="module")
def made(dense):
    output = dense.with_name("made")
    kind = f"web={text_of(dense)}"
    done = run("compress", dense, "-o", output, "--bits", 4, "--data", kind, "--own-text", 0, *SETTINGS)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "bits per weight in" in done.output and "dbf_report.html" in done.output
    return output


@pytest.mark.slow
def test_inspect_shows_coverage_bits_and_errors(made, dense):
    text = run("inspect", made).output
    assert "model.embed_tokens" in text and "model.layers.0.mlp.down_proj" in text
    assert "all, in the dense model" in text and "as look-ups" in text
    found = facts("inspect", made)
    report = json.loads((made / "dbf_report.json").read_text())
    assert found["factored"] == pytest.approx(report["bits"]["factored"])
    assert found["file"] == pytest.approx(report["bits"]["file"])
    assert found["share"] == pytest.approx(report["coverage"]["share"])
    assert [row["error"] for row in found["layers"]] == [row["error"] for row in report["layers"]]
    assert report["operations"].items() <= found["operations"].items()
    for name in ("additions", "lookups", "lookup_additions", "multiplications"):
        layers = sum(row["operations"][name] for row in found["layers"])
        assert layers == found["operations"]["factored"][name] > 0
    with pytest.raises(DBFError, match="not compressed"):
        raise run("inspect", dense).exception


def test_inspect_gives_the_reasons_of_the_run_that_made_it(dense, tmp_path):
    settings = {"skip": ["*lm_head", "*o_proj"], "overrides": {"*v_proj": 0.1}, "merge_shared_inputs": False}
    more = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    done = run("compress", dense, "-o", tmp_path / "made", "--bits", 4, *SETTINGS, *more)
    assert done.exit_code == 0, (done.output, done.exception)
    reasons = {row["name"]: row["reason"] for row in facts("inspect", tmp_path / "made")["dense"]}
    assert reasons["model.layers.0.self_attn.o_proj"] == "skipped by name"
    assert reasons["model.layers.0.self_attn.v_proj"] == "too small to gain at 0.1 bits per weight"
    for report in ("", "[]", '{"settings": 1, "layers": 2}', '{"settings": {"skip": 3}}'):
        (tmp_path / "made" / "dbf_report.json").write_text(report)
        assert facts("inspect", tmp_path / "made")["layers"][0]["error"] is None


def test_inspect_notices_damage(made, tmp_path):
    import shutil

    shutil.copytree(made, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DBFError, match="copy the folder again"):
        raise run("inspect", tmp_path / "copy").exception


def test_eval_states_the_context_length(made, dense):
    found = facts("eval", made, "--data", text_of(dense), "--dense", dense, "--length", 32, "--windows", 3)
    assert found["context_length"] == 32 and found["windows"] == 3
    assert {"perplexity", "kl", "top1_agreement", "dense"} <= found.keys()
    assert isinstance(run("eval", made).exception, OptionError)


def test_data_is_named_as_in_python(made, dense, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": line}) + "\n" for line in ["add the signs " * 9] * 4))
    settings = ("--length", 32, "--windows", 99)
    one = facts("eval", made, "--data", rows, "--column", "body", *settings)
    two = facts("eval", made, "--data", rows, "--data", rows, "--column", "body", *settings)
    assert 0 < one["windows"] < two["windows"]
    error = run("eval", made, "--data", rows, *settings).exception
    assert "'body'" in str(error) and "pass column=" in str(error)
    assert "data without splits" in str(run("eval", made, "--data", rows, "--split", "test").exception)


def test_eval_prints_a_column_for_every_kind_of_text(made, dense):
    kinds = ("--data", f"web={text_of(dense)}", "--data", f"code={text_of(dense)}")
    done = run("eval", made, *kinds, "--dense", dense, "--length", 32, "--windows", 2, "--no-progress")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["web", "code", "mean", "worst"]
    assert [line[0] for line in lines[1:3]] == ["windows", "kl"] and len(lines[2]) == 5
    assert "Calibrated with one kind of text alone" in done.stdout


def test_results_are_on_stdout_and_progress_on_stderr(made, dense):
    arguments = ("eval", made, "--data", text_of(dense), "--length", 32, "--windows", 3, "--json")
    done = run(*arguments)
    assert json.loads(done.stdout)["windows"] == 3 and "evaluating" in done.stderr
    silent = run(*arguments, "--no-progress")
    assert json.loads(silent.stdout)["windows"] == 3 and not silent.stderr
    for command in ("inspect", "doctor"):
        arguments = (command, made) if command == "inspect" else (command,)
        assert run(*arguments).stderr and not run(*arguments, "--no-progress").stderr


@pytest.mark.slow
def test_generate_streams_text_and_figures(made, dense):
    done = run("generate", made, "add the", "-n", 4, "--no-compiled")
    assert done.exit_code == 0 and "tokens/s" in done.output and "add the" in done.output
    found = facts("generate", made, "add the", "-n", 4, "--no-compiled", "--dense", dense)
    assert set(found) == {str(made), str(dense)}
    figures = found[str(made)]
    assert figures["new_tokens"] == 4 and figures["prompt_tokens"] == 7
    assert figures["weight_bytes"] < found[str(dense)]["weight_bytes"]
    assert figures["text"] in done.output
    compiled = facts("generate", made, "add the", "-n", 4)
    assert compiled[str(made)]["text"] == figures["text"]


@pytest.mark.slow
def test_bench_times_both_models_in_turns(made, dense, monkeypatch, tmp_path):
    arguments = ("bench", made, "--dense", dense, "--prompt-tokens", 5, "-n", 3, "--rounds", 1)
    found = facts(*arguments)
    assert all(row["decode_rate"] > 0 and row["new_tokens"] == 3 for row in found.values())
    monkeypatch.setattr(Meter.of, "__defaults__", (tmp_path, None))  # a machine without counters
    output = run(*arguments, "--energy", "--device", "cpu").output
    assert "times the dense model's" in output and "not measured: dram, no RAPL" in output


def test_doctor_names_what_is_there_and_what_is_missing(monkeypatch, tmp_path):
    found = facts("doctor")
    assert found["torch"]["state"] == "good" and "CPU kernels" in found
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DBF_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run("doctor")
    assert done.exit_code == 1
    assert "set DBF_CACHE_DIR" in done.output and "install g++ or clang++" in done.output


def test_settings_are_json_or_text():
    assert parse_settings(["a=1", 'b=["x"]', "c=fast", "d=null"]) == {
        "a": 1,
        "b": ["x"],
        "c": "fast",
        "d": None,
    }
    with pytest.raises(OptionError, match="name=value"):
        parse_settings(["distill"])


def test_help_teaches_by_example():
    for command in ("compress", "eval", "generate", "bench", "inspect"):
        assert f"dbf-compile {command} " in run(command, "--help").output
    assert run("compress").exit_code == 2


def command(*arguments):
    return [sys.executable, "-m", "dbf_compile.cli", *(str(argument) for argument in arguments)]


@pytest.mark.slow
def test_an_error_is_one_line_and_status_1(tmp_path):
    done = subprocess.run(
        command("compress", tmp_path / "nothing", "-o", tmp_path / "made"), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["opening", "error:"], done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_what_can_be_gone_on_with(dense, tmp_path):
    output = tmp_path / "made"
    given = ("compress", dense, "-o", output, "--bits", 4, "--data", text_of(dense), "--mode", "independent")
    slow = [*given, *SETTINGS, "--set", "iterations=100000"]
    process = subprocess.Popen(
        command(*slow),
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, which tests may be part of, ignore interrupts, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "made.work" / "importance.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # in the middle of a weight
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    assert (tmp_path / "made.work" / "manifest.json").exists() and not output.exists()


def test_of_processes_of_torchrun_one_prints(capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank, printed in (("0", "done\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        cli._print(False, {}, lambda: "done")
        assert capsys.readouterr().out == printed
    monkeypatch.delenv("MASTER_PORT")  # a variable that something else has left starts no processes
    cli._print(False, {}, lambda: "done")
    assert capsys.readouterr().out == "done\n"


def test_of_warnings_a_user_sees_what_concerns_them(capfd):
    program = (
        "import warnings; from dbf_compile import cli\n"
        "cli.app = lambda **_: [warnings.warn(f'{kind.__name__} here', kind, stacklevel=1)"
        " for kind in (UserWarning, FutureWarning)]\n"
        "cli.main()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert capfd.readouterr() == ("", "warning: UserWarning here\n")
