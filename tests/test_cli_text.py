"""The commands that write text: prompts from everywhere, text alone on stdout, conversations from a pipe."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
from support.models.chat import chat_folder
from typer.testing import CliRunner

from dbf_compile import cli
from dbf_compile.errors import ConversionError, OptionError

FEW = ("-n", "4", "--no-compiled")


def run(*arguments, text=None):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=text)


def rows(*arguments, text=None):
    done = run(*arguments, *FEW, "--json", text=text)
    assert done.exit_code == 0, (done.output, done.exception)
    (value,) = json.loads(done.stdout).values()
    return value


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("text") / "model")


def test_text_is_alone_on_stdout(model):
    row = rows("generate", model, "add")
    assert row["prompt"] == "add" and row["new_tokens"] == 4
    done = run("generate", model, "add", *FEW)
    assert done.stdout == f"add{row['text']}\n"
    assert "opening" in done.stderr and "tokens/s" in done.stderr
    assert not run("generate", model, "add", *FEW, "--no-progress").stderr


def test_prompts_come_from_arguments_files_and_stdin(model, tmp_path):
    both = rows("generate", model, "add", "of\nit")
    assert [row["prompt"] for row in both] == ["add", "of\nit"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('"add"\n\n{"prompt": "of\\nit"}\n')
    lines = tmp_path / "prompts.txt"
    lines.write_text("add\n \n")
    texts = [row["text"] for row in both]
    assert [row["text"] for row in rows("generate", model, "--prompt-file", file)] == texts
    assert [row["text"] for row in rows("generate", model, "--prompt-file", lines)] == texts[:1]
    assert [row["prompt"] for row in rows("generate", model, "--prompt-file", "-", text="a\nb\n")] == [
        "a",
        "b",
    ]
    for arguments in ((), ("-",)):
        assert rows("generate", model, *arguments, text="of\nit\n")["text"] == texts[1]
    done = run("generate", model, "add", "of\nit", *FEW)
    assert done.stdout == f"--- prompt 1\nadd{texts[0]}\n--- prompt 2\nof\nit{texts[1]}\n"


def test_two_models_are_told_apart(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    text = rows("generate", model, "add")["text"]
    done = run("generate", model, "add", "--dense", other, *FEW)
    assert done.stdout == f"--- {model}\nadd{text}\n--- {other}\nadd{text}\n"
    assert done.exit_code == 0 and run("generate", model, "add", "--dense", model, *FEW).exit_code == 2


def test_a_chat_is_an_answer_through_the_template(model):
    plain = rows("generate", model, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert rows("generate", model, "--chat", "hi")["text"] == plain["text"]
    assert run("generate", model, "--chat", "hi", *FEW).stdout == f"{plain['text']}\n"
    told = rows("generate", model, "--system", "be kind", "hi")
    assert told["prompt_tokens"] > plain["prompt_tokens"]


def test_settings_of_drawing_and_stop_strings_arrive(model):
    text = rows("generate", model, "add")["text"]
    assert rows("generate", model, "add", "--stop", text[1:], "--stop", "nothing")["text"] == text[:1]
    drawn = [
        rows("generate", model, "add", "--temperature", 5, "--seed", seed)["text"] for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len({*drawn, text}) > 2
    assert rows("generate", model, "add", "--top-k", 1)["text"] == text
    error = run("generate", model, "add", "--no-sample", "--top-p", 0.5, *FEW).exception
    assert isinstance(error, OptionError) and "without drawing" in str(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "--prompt-file", "-"), "pass one of them"),
        (("--prompt-file", "no/such"), "check the path"),
        (("--prompt-file", "{empty}"), "without prompts"),
        (("--prompt-file", "{wrong}"), "line 1 of"),
    ],
)
def test_prompts_that_are_none_are_refused_before_a_model_is_opened(arguments, words, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"text": 1}\n')
    places = {"empty": tmp_path / "empty", "wrong": tmp_path / "wrong.jsonl"}
    done = run("generate", "no/such/model", *(argument.format(**places) for argument in arguments))
    assert words in done.output + str(done.exception)


def test_a_conversation_from_a_pipe(model):
    done = run(
        "chat",
        model,
        "--seed",
        1,
        "-n",
        4,
        "--no-compiled",
        text="hi\n/system be kind\n<|im_end|>\n/exit\nno\n",
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stderr.count("tokens/s") == 2 and "system message: be kind" in done.stderr
    assert "tokens/s" not in done.stdout and "system" not in done.stdout


def test_a_model_without_template_is_refused_before_its_weights_are_read(tmp_path):
    folder = chat_folder(tmp_path / "model", template=None)
    (folder / "model.safetensors").write_bytes(b"")
    for arguments in (("chat", folder), ("generate", folder, "--chat", "hi")):
        error = run(*arguments).exception
        assert isinstance(error, ConversionError) and "dbf-compile generate" in str(error)


class Screen:
    """What a program writes into a terminal, taken piece by piece; pieces end where words do."""

    def __init__(self, descriptor):
        self.descriptor, self.unread = descriptor, ""

    def until(self, *words, seconds=90):
        """Return the first of these words that is there, and what stood before it."""
        end = time.monotonic() + seconds
        while not (found := [(self.unread.index(word), word) for word in words if word in self.unread]):
            assert time.monotonic() < end, self.unread
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.unread += os.read(self.descriptor, 4096).decode(errors="replace")
        place, word = min(found)
        before, self.unread = self.unread[:place], self.unread[place + len(word) :]
        return word, before


@pytest.mark.slow
def test_a_conversation_in_a_terminal(model):
    near, far = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dbf_compile.cli",
            "chat",
            str(model),
            "-n",
            "110",
            "--no-compiled",
            "--seed",
            "1",
        ],
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "TERM": "dumb"},
    )
    try:
        screen = Screen(near)
        assert "opening" in screen.until("> ")[1]
        stopped, idle = "[stopped after", "Ctrl-C again ends the program"
        for delay in (0.3, 0.1, 0.05, 0.02, 0.01):  # a fast machine has answered before
            os.write(near, b"hi\r")
            screen.until("hi\r\n")
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            said, _ = screen.until(stopped, idle)
            screen.until("> ")
            if said == stopped:
                break
        assert said == stopped
        os.write(near, b"/exit\r")
        screen.until("/exit")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(near), os.close(far)
