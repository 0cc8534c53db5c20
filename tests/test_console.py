"""The console: a terminal, a pipe, messages of several lines, commands, and Ctrl-C where it may come."""

import io
import json
import os
import pty
import select
import signal
import sys
import time
from contextlib import suppress

import pytest

from dbf_compile.console import Console
from dbf_compile.errors import OptionError
from dbf_compile.generation import Generation


class Echo:
    """A conversation whose answers repeat the message, letter by letter."""

    def __init__(self, seconds=0.0):
        self.messages, self.system, self.left_out, self.cut_off = [], None, 0, False
        self._seconds = seconds

    def ask(self, message, *, max_new_tokens, stream, **options):
        if message == "wrong":
            raise OptionError("a wrong message", "right ones", "write another")
        if message == "long":
            self.left_out += 2
        for letter in message:
            stream(letter)
            time.sleep(self._seconds)
        self.cut_off = len(message) >= max_new_tokens
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": message}]
        return Generation(message, 3, len(message), 0.1, 1.0, 0.0, 0)

    def clear(self):
        self.messages.clear()


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that lets a console read a text from a pipe, and returns its conversation, stdout and stderr."""

    def run(text, progress=False, tokens=100):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        conversation = Echo()
        Console(conversation, max_new_tokens=tokens, progress=progress, options={}).run()
        return conversation, *capsys.readouterr()

    return run


def asked(conversation):
    return [item["content"] for item in conversation.messages[::2]]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", []),
        ("one\n\n  \ntwo", ["one", "two"]),
        ("one\r\n two \n", ["one", "two"]),
        ("one \\\ntwo\\\n\nthree", ["one \ntwo", "three"]),
        ("one\\", ["one"]),
        ('"""one\n\ntwo"""\nthree', ["one\n\ntwo", "three"]),
        ('"""\n/exit\n  two\n"""\nthree', ["/exit\n  two", "three"]),
        ('"""one"""\n"""two', ["one", "two"]),
        ("/exit\none", []),
        (" /exit\none", ["/exit", "one"]),
        ("a 🙂\n", ["a 🙂"]),
    ],
)
def test_each_line_of_a_pipe_is_a_message(run, text, messages):
    conversation, out, errors = run(text)
    assert asked(conversation) == messages
    assert out == "".join(f"{message}\n" for message in messages) and not errors


def test_answers_are_on_stdout_and_figures_on_stderr(run):
    _, out, errors = run("hello\nlong\n", progress=True, tokens=5)
    assert out == "hello\nlong\n"
    assert "5 tokens, 4.0 tokens/s" in errors and errors.count("cut off") == 1
    assert "no longer reads the first 2 messages" in errors


def test_an_error_is_said_and_the_conversation_goes_on(run):
    conversation, out, errors = run("wrong\nright\n")
    assert asked(conversation) == ["right"] and out == "right\n"
    assert errors == "error: a wrong message; allowed: right ones; write another\n"


def test_commands(run, tmp_path):
    file = tmp_path / "chat.json"
    conversation, out, errors = run(
        f"/system be kind\none\n/save {file}\n/clear\n/save {file}\n/nonsense\n/help\n"
    )
    assert out == "one\n" and not conversation.messages and conversation.system == "be kind"
    saved = json.loads(file.read_text())["messages"]
    assert [item["role"] for item in saved] == ["system", "user", "assistant"]
    for words in ("system message: be kind", "is not written", "no command /nonsense", "/clear"):
        assert words in errors
    conversation, _, errors = run("/system x\n/system -\n/system\n")
    assert conversation.system is None and "that of the chat template" in errors
    assert "is not written" in run(f"/save {tmp_path}/no/such\n")[2]


class Terminal:
    """A console in a process of its own, behind a terminal."""

    def __init__(self, seconds=0.0, stdout=None):
        sys.stdout.flush(), sys.stderr.flush()
        self._process, self._near = pty.fork()
        if not self._process:
            _be_a_console(seconds, stdout)
        self.text = ""

    def type(self, text):
        data = text.encode()
        while data:
            data = data[os.write(self._near, data) :]

    def expect(self, words, seconds=20):
        """Read until the words are there, and forget all up to them."""
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, (words, self.text)
            if select.select([self._near], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self._near, 4096).decode(errors="replace")
                except OSError as error:  # the other side is closed
                    raise AssertionError((words, self.text)) from error
        before, _, self.text = self.text.partition(words)
        return before

    def status(self):
        with suppress(OSError):
            while os.read(self._near, 4096):
                pass
        os.close(self._near)
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])


def _be_a_console(seconds, stdout):
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if stdout is not None:
            os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, encoding="utf-8", closefd=False)
            for number, mode in enumerate(("r", "w", "w"))
        )
        Console(Echo(seconds), max_new_tokens=1000, progress=True, options={}).run()
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


@pytest.fixture
def terminal():
    opened = []

    def begin(**options):
        opened.append(Terminal(**options))
        return opened[-1]

    yield begin
    for each in opened:
        with suppress(OSError):
            os.kill(each._process, signal.SIGKILL)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    console = terminal(seconds=0.02)
    console.expect("> ")
    console.type("a" * 300 + "\n")
    console.expect("a" * 300 + "\r\naaaa")  # the echo, then the answer
    console.type("\x03\x03\x03")
    console.expect("> ")
    console.type("next\n")
    console.expect("next\r\nnext\r\n")
    console.expect("tokens/s")
    console.expect("> ")
    time.sleep(0.2)  # Python misses a signal between its prompt and the moment when it reads
    console.type("\x03")
    console.expect("Ctrl-C again ends the program")
    console.expect("> ")
    time.sleep(0.6)  # within half a second it would be the same one
    console.type("\x03")
    assert console.status() == 0


def test_ctrl_d_ends_the_program(terminal):
    console = terminal()
    console.expect("> ")
    console.type("\x04")
    assert console.status() == 0


def test_pasted_lines_are_one_message(terminal):
    console = terminal()
    console.expect("> ")
    console.type("one\ntwo\nthree\n")
    console.expect("one\r\ntwo\r\nthree\r\n[")
    console.type("/exit\n")
    assert console.status() == 0


def test_what_the_terminal_cuts_off_is_no_message(terminal):
    console = terminal(stdout=os.devnull)  # on a terminal the module readline edits lines of any length
    console.expect("> ")
    console.type("first\n" + "x" * 6000 + "\nlast\n")
    console.expect("error: a line of 4095 bytes, where terminals cut lines off")
    console.expect("> ")
    console.type("next\n")
    assert "[" not in console.expect("next\r\n")  # nothing was answered in between
    console.expect("tokens/s")
    console.expect("> ")
    console.type("/exit\n")
    assert console.status() == 0


def test_prompts_are_no_part_of_a_file(terminal, tmp_path):
    console = terminal(stdout=tmp_path / "answers")
    console.expect("> ")
    console.type("one\n")
    console.expect("tokens/s")
    console.expect("> ")
    console.type("/exit\n")
    assert console.status() == 0
    assert (tmp_path / "answers").read_text() == "one\n"
