"""Files: the cache folder, and atomic writes, so that nobody ever reads half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock

from dbf_compile.errors import OptionError


def cache_folder() -> Path:
    """Return ``$DBF_CACHE_DIR``, else the user's cache folder for dbf_compile; it may not exist yet."""
    override = os.environ.get("DBF_CACHE_DIR")
    folder = Path(override or platformdirs.user_cache_dir("dbf_compile"))
    # A user without a home has "~/.cache", which is no place below the current folder: nothing can be kept.
    return folder if override or folder.is_absolute() else Path(os.devnull) / "dbf_compile"


def user_path(name: str | Path) -> Path:
    """Return a path as users write it: ``~`` is their home.

    Raises:
        OptionError: an empty name, which would be the current folder, or something else than a path.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise OptionError(
            f"a {type(name).__name__} in place of a path",
            "a path, or a name on the Hub",
            "save the model first, with save_pretrained, if it is one",
        )
    if not str(name):
        raise OptionError(
            "an empty path", "a path, or . for the current folder", "look for a variable without a value"
        )
    return Path(os.path.expanduser(name))  # noqa: PTH111  leaves a user who is not known as it is


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; at the end it is flushed to disk and renamed to ``path``.

    If the block raises, ``path`` is left as it was.

    Args:
        path: the file; its folder exists.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:32]}.") as folder:
        partial = Path(folder) / "partial"
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask gives a new file; writers may make it private
        yield partial
        partial.chmod(mode)
        _flush(partial)
        partial.replace(path)
    _flush(path.parent)  # the new name, too


@contextmanager
def one_at_a_time(path: Path, seconds: float) -> Iterator[None]:
    """Let one process at a time run the block, so that those that start together make one thing once.

    After a long wait, and where a file system has no locks, two run it at once.

    Args:
        path: of the lock, a file that stays.
        seconds: how long to wait.
    """
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):  # a Timeout is an OSError
        lock.acquire(seconds)
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 by atomic rename; it replaces what was there."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def new_folder_mode() -> int:
    """Return the mode that the user's umask gives a new folder; temporary ones are private."""
    try:
        # Setting the umask to read it would open the files that other threads make meanwhile.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        mask = next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):
        mask = os.umask(0)
        os.umask(mask)
    return 0o777 & ~mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
