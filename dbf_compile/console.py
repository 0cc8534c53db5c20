"""A conversation in a terminal, or line by line from a pipe: answers on stdout, all else on stderr."""

from __future__ import annotations

import json
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dbf_compile.chat import Conversation
from dbf_compile.errors import DBFError, OptionError
from dbf_compile.files import user_path
from dbf_compile.progress import say
from dbf_compile.terminal import streamed_text

HELP = """\
/help           this help
/clear          forget the conversation, but not the system message
/system [TEXT]  show the system message, or set it; /system - takes it away
/save [FILE]    write the conversation to a file, as JSON
/exit           end the program, as Ctrl-D does
A line that ends with \\ goes on in the next one. Between two lines of \"\"\" there may be any lines.
A message that begins with / needs a space before it. Ctrl-C stops an answer."""
_QUOTES = '"""'
_TERMINAL_LINE_BYTES = 4095  # of a line that nobody edits; Linux drops what is typed after them
_IMPATIENT_SECONDS = 0.5  # in which several Ctrl-C mean one
_PASTE_SECONDS = 0.05  # between the lines of a paste; nobody types a line in that time


class Console:
    """Reads messages from stdin until it ends, and answers them.

    Args:
        conversation: with the model.
        max_new_tokens: of an answer.
        progress: say on stderr what goes on, and how fast it went.
        options: of ``Conversation.ask``.
    """

    def __init__(
        self, conversation: Conversation, *, max_new_tokens: int, progress: bool, options: dict[str, Any]
    ) -> None:
        self._conversation, self._max_new_tokens, self._options = conversation, max_new_tokens, options
        self._is_terminal = sys.stdin.isatty()
        self._progress = progress
        self._stopped: float | None = None  # when Ctrl-C came last, if nothing was read since

    def run(self) -> None:
        """Answer until /exit, the end of stdin, or a second Ctrl-C; where stdin is no terminal, until the first."""
        self._note("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends the program", self._is_terminal)
        for message in self._messages():
            if message.startswith("/"):
                name, _, argument = message[1:].partition(" ")
                if name in ("exit", "quit"):
                    return
                self._obey(name, argument.strip())
            else:
                self._answer(message.strip())

    def _messages(self) -> Iterator[str]:
        """Yield what is typed, without empty messages."""
        while True:
            try:
                message = self._read()
            except EOFError:
                self._note("", self._is_terminal)
                return
            except OptionError as error:
                while _more_is_there():  # the rest of a paste is no message of its own
                    sys.stdin.readline()
                self._note(f"error: {error}", True)
                continue
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                self._note("", True)
                if self._stopped is None:
                    self._note("Ctrl-C again ends the program", True)
                elif time.monotonic() - self._stopped > _IMPATIENT_SECONDS:
                    return
                self._stopped = time.monotonic()
                continue
            if message.strip():
                self._stopped = None
                yield message

    def _read(self) -> str:
        """Return a message of one line or more."""
        line = self._line("> ")
        if line.strip().startswith(_QUOTES):
            return self._quoted(line.strip().removeprefix(_QUOTES))
        while line.endswith("\\"):
            try:
                line = line[:-1] + "\n" + self._line(". ")
            except EOFError:
                return line[:-1]
        while self._is_terminal and _more_is_there():
            line += "\n" + self._line("")
        return line

    def _quoted(self, line: str) -> str:
        """Return the lines up to one that ends with quotes, as a message that is no command."""
        lines = []
        while not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            try:
                line = self._line(". ")
            except EOFError:
                break
        else:
            lines.append(line.rstrip().removesuffix(_QUOTES))
        text = "\n".join(lines).strip("\n")
        return f" {text}" if text.startswith("/") else text

    def _line(self, prompt: str) -> str:
        shows_prompts = self._is_terminal and sys.stdout.isatty()
        if shows_prompts:
            line = input(prompt)  # with history and editing, if the module readline was imported
        else:
            if self._is_terminal:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            line = line.rstrip("\r\n")
        is_edited = shows_prompts and "readline" in sys.modules
        if self._is_terminal and not is_edited and len(line.encode(errors="replace")) >= _TERMINAL_LINE_BYTES:
            raise OptionError(
                f"a line of {_TERMINAL_LINE_BYTES} bytes, where terminals cut lines off",
                "shorter lines",
                f"put the lines of a long message between two lines of {_QUOTES}, or pass it through a pipe",
            )
        return line

    def _answer(self, message: str) -> None:
        with _one_interrupt():
            self._answered(message)

    def _answered(self, message: str) -> None:
        conversation, before, began = self._conversation, self._conversation.left_out, time.perf_counter()
        try:
            with streamed_text() as write:
                answer = conversation.ask(
                    message, max_new_tokens=self._max_new_tokens, stream=write, **self._options
                )
        except DBFError as error:
            self._note(f"error: {error}", True)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            self._stopped = time.monotonic()
            self._note(f"[stopped after {time.perf_counter() - began:.1f} s]")
        else:
            self._note(
                f"[{answer.new_tokens} tokens, {answer.decode_rate:.1f} tokens/s, "
                f"the first after {answer.prefill_seconds:.1f} s]"
            )
            if conversation.cut_off:
                self._note(
                    f"[cut off after {answer.new_tokens} tokens; --tokens allows more, up to the model's positions]"
                )
        if conversation.left_out > before:
            self._note(
                f"[the conversation is longer than the model can read: it no longer reads the first "
                f"{conversation.left_out} messages and answers]"
            )

    def _obey(self, name: str, argument: str) -> None:
        conversation = self._conversation
        if name == "help":
            self._note(HELP, True)
        elif name == "clear":
            conversation.clear()
            self._note("[the conversation is empty]")
        elif name == "system":
            if argument:
                conversation.system = None if argument == "-" else argument
            self._note(
                f"[system message: {conversation.system or 'that of the chat template, if it has one'}]", True
            )
        elif name == "save":
            self._save(user_path(argument or time.strftime("chat-%Y%m%d-%H%M%S.json")))
        else:
            self._note(f"no command /{name}; /help lists them, and a space before / makes it a message", True)

    def _save(self, file: Path) -> None:
        conversation = self._conversation
        system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
        try:
            with file.open("x", encoding="utf-8") as stream:
                json.dump(
                    {"messages": [*system, *conversation.messages]}, stream, ensure_ascii=False, indent=1
                )
        except OSError as error:
            self._note(f"error: {file} is not written ({error.strerror})", True)
        else:
            self._note(f"[saved to {file}]")

    def _note(self, text: str, shown: bool | None = None) -> None:
        say(text, self._progress if shown is None else shown)


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first Ctrl-C of the block; more of them would end the program while it stops."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: None)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _more_is_there() -> bool:
    """Return whether stdin has another line already: it is a part of what was pasted."""
    with suppress(OSError, ValueError):
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    return False
