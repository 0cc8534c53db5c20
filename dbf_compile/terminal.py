"""Text on stdout, alone: what others write meanwhile comes after it, and no text fails for what a terminal cannot show."""

from __future__ import annotations

import _thread
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dbf_compile.errors import OptionError

# What a terminal would obey: all control characters but line feed and tab.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def prepare_streams() -> None:
    """Make the standard streams usable: they replace what their encoding lacks, and a closed one is the null device.

    Else the next file that is opened would take the place of a closed one, and be read or written in its stead.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def deliver_interrupts() -> None:
    """Let no Ctrl-C get lost: Python drops one that comes while it runs a destructor."""
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Later, since an interruption of this hook is dropped, too.
            threading.Timer(0.01, _thread.interrupt_main).start()
        else:
            report(unraisable)

    sys.unraisablehook = hook


@contextmanager
def complete_output() -> Iterator[None]:
    """Refuse at the end of the block what stdout has not taken; it is closed then.

    Raises:
        OptionError: it cannot be written.
        BrokenPipeError: nobody reads it any more.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if _is_flushed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the end of Python fails, too
        if isinstance(error, BrokenPipeError):
            raise
        raise OptionError(
            f"standard output, which cannot be written ({error.strerror})",
            "a terminal, a pipe, or a file with room",
            "make room, or write to another place",
        ) from error


def _is_flushed() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def readable(text: str) -> str:
    """Return a text from the command line; bytes of it that are no UTF-8 are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextmanager
def streamed_text() -> Iterator[Callable[[str], None]]:
    """Give a function that writes text to stdout, piece after piece; the text ends with a line feed.

    From the first piece to the end, what anything in this process writes to stderr is held back, if both streams lead to the
    same place. On a terminal, control characters are left out.
    """
    text = _Text()
    try:
        yield text.write
    finally:
        text.end()


class _Text:
    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._last = ""
        self._held: _HeldStderr | None = None

    def write(self, piece: str) -> None:
        if self._is_terminal:
            piece = piece.translate(_CONTROLS)
        if not piece:
            return
        if self._held is None and _one_place():
            self._held = _HeldStderr()
        self._last = piece
        sys.stdout.write(piece)
        sys.stdout.flush()

    def end(self) -> None:
        try:
            if self._last and not self._last.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
        finally:
            if self._held is not None:
                self._held.release()


class _HeldStderr:
    """File descriptor 2, kept in a file until it is released: libraries in C++ and logging handlers write there, too."""

    def __init__(self) -> None:
        sys.stderr.flush()
        self._stderr = os.dup(2)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open until the release
        os.dup2(self._file.fileno(), 2)

    def release(self) -> None:
        sys.stderr.flush()
        os.dup2(self._stderr, 2)
        self._file.seek(0)
        while block := self._file.read(1 << 16):
            os.write(2, block)
        self._file.close()
        os.close(self._stderr)


def _one_place() -> bool:
    """Return whether stdout and stderr lead to the same terminal, pipe or file."""
    try:
        out, errors = (os.fstat(stream.fileno()) for stream in (sys.stdout, sys.stderr))
    except (OSError, ValueError):  # a stream in memory
        return False
    return sys.stderr.fileno() == 2 and (out.st_dev, out.st_ino, out.st_rdev) == (
        errors.st_dev,
        errors.st_ino,
        errors.st_rdev,
    )
