"""Text on stdout: nothing breaks into it, nothing is lost, and what a terminal cannot show does no harm."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress

import pytest

from dbf_compile.errors import OptionError
from dbf_compile.terminal import (
    complete_output,
    deliver_interrupts,
    prepare_streams,
    readable,
    streamed_text,
)


def opened(number):
    """Return a stream of text to a file descriptor, which stays open."""
    return os.fdopen(number, "w", encoding="utf-8", closefd=False)


@pytest.fixture
def one_file(monkeypatch, capfd):
    """Return a function that lets both standard streams lead to one file, and yields what reads it."""

    @contextmanager
    def one_file():
        with capfd.disabled(), tempfile.TemporaryFile() as file:
            kept = os.dup(1), os.dup(2)
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", opened(1))
                patch.setattr(sys, "stderr", opened(2))
                try:
                    yield lambda: os.pread(file.fileno(), 10**6, 0).decode()
                finally:
                    for number, descriptor in zip((1, 2), kept, strict=True):
                        os.dup2(descriptor, number)
                        os.close(descriptor)

    return one_file


def test_what_is_written_to_stderr_comes_after_the_text(one_file):
    with one_file() as written:
        with streamed_text() as write:
            print("before", file=sys.stderr, flush=True)
            write("once ")
            os.write(2, b"a library in C++\n")
            print("a library", file=sys.stderr)
            write("upon")
        print("later", file=sys.stderr, flush=True)
        text = written()
    assert text == "before\nonce upon\na library in C++\na library\nlater\n"


def test_an_interruption_ends_the_text_and_loses_nothing(one_file):
    with one_file() as written:
        with pytest.raises(KeyboardInterrupt), streamed_text() as write:
            write("once")
            print("a warning", file=sys.stderr)
            raise KeyboardInterrupt
        text = written()
    assert text == "once\na warning\n"


def test_streams_to_two_places_do_not_wait_for_each_other(capfd):
    with streamed_text() as write:
        write("once")
        os.write(2, b"a warning\n")
        assert capfd.readouterr() == ("once", "a warning\n")
    assert capfd.readouterr() == ("\n", "")


@pytest.mark.parametrize(("pieces", "text"), [([], ""), (["", "a\n"], "a\n"), (["a"], "a\n"), (["\n"], "\n")])
def test_a_text_ends_with_one_line_feed(capsys, pieces, text):
    with streamed_text() as write:
        for piece in pieces:
            write(piece)
    assert capsys.readouterr().out == text


def test_a_terminal_is_given_no_control_characters(monkeypatch, capfd):
    text = "a\x1b[2J\x07\r\x9b\tß🙂\n"
    with streamed_text() as write:
        write(text)
    assert capfd.readouterr().out == text
    near, far = pty.openpty()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", opened(far))
            with streamed_text() as write:
                write(text)
        assert os.read(near, 1000).decode() == "a[2J\tß🙂\r\n"
    finally:
        os.close(near), os.close(far)


def test_no_text_fails_for_its_characters(monkeypatch):
    written, typed = io.BytesIO(), io.BytesIO(b"gr\xfc\xdfe\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    prepare_streams()
    with streamed_text() as write:
        write("ok 🙂")
    assert written.getvalue() == b"ok ?\n"
    assert sys.stdin.readline() == "gr��e\n"
    assert readable("gr\udcfcn ß") == "gr�n ß"


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_closed_stream_is_the_null_device(closed, tmp_path):
    """Else the next file that is opened takes its place, and what is said is written into it."""
    code = (
        "from dbf_compile.terminal import prepare_streams; import sys; prepare_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('said'); print('noted', file=sys.stderr); sys.stdin.read(); sys.stdout.flush()\n"
        "assert file.fileno() > 2; file.write('kept')"
    )
    shut = " ".join(f"{number}{'<' if not number else '>'}&-" for number in closed)
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {shut}', sys.executable, code], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, OptionError), (errno.EIO, OptionError), (errno.EPIPE, OSError)]
)
def test_output_that_is_not_taken_is_an_error(number, error, monkeypatch):
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, _):
            raise OSError(number, os.strerror(number))

        def fileno(self):
            return place.fileno()

    with tempfile.TemporaryFile() as place:
        stream = io.TextIOWrapper(io.BufferedWriter(Full()))
        monkeypatch.setattr(sys, "stdout", stream)
        words = "cannot be written" if error is OptionError else "Broken pipe"
        with pytest.raises(error, match=words), complete_output():
            print("text")
        monkeypatch.undo()
        with suppress(OSError):
            stream.close()


def test_errors_of_other_files_are_left_as_they_are():
    with pytest.raises(FileNotFoundError), complete_output():
        raise FileNotFoundError("another file")


def test_ctrl_c_in_a_destructor_is_not_lost(monkeypatch):
    class Slow:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    deliver_interrupts()
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Slow()
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, kept)
