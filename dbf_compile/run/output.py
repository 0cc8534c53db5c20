"""The place of a compressed folder: where it may lie, and what lies beside it while it is made."""

from __future__ import annotations

import shutil
import stat
from contextlib import suppress
from pathlib import Path

from dbf_compile.errors import OptionError
from dbf_compile.run.report import REPORT


def work_folder(output: Path) -> Path:
    """Return the folder, beside that of a compressed model, which keeps what is done so far."""
    return output.with_name(output.name + ".work")


def check_output(output: Path) -> None:
    """Refuse, before anything is opened, an output whose folder could not be moved into place at the end.

    Raises:
        OptionError: its parent is no folder, something else is there already, or no folder can be made beside it.
    """
    if not output.parent.is_dir():
        raise OptionError(
            f"output {output}, whose parent is no folder", "a folder that exists", "make it first"
        )
    if output.is_symlink() and not output.exists():
        raise OptionError(
            f"output {output}, a link to {output.readlink()}, where nothing is",
            "a path where nothing is",
            "remove the link, or name the place where it leads",
        )
    if output.exists() and not (output / REPORT).is_file():  # else it may be the result of the same call
        raise existing(output)
    if output.name:
        _check_work(work_folder(output))


def check_place(output: Path, source: Path | None, least: int) -> None:
    """Refuse an output inside the folder of its source, or where there is too little room.

    Args:
        output: the folder to write.
        source: the folder of the model that it is made of, or None.
        least: bytes that the work takes at the very least, with what is done already.

    Raises:
        OptionError: it cannot lie there.
    """
    if source is not None and output.resolve().is_relative_to(source.resolve()):
        raise OptionError(
            f"output {output} inside {source}, the model's own folder",
            "a path outside",
            "choose another output",
        )
    free = shutil.disk_usage(output.parent).free
    if free < least and free + _size(work_folder(output)) < least:
        raise OptionError(
            f"output {output}, where {free:,} bytes are free",
            f"{least:,} bytes at the very least",
            "make room, or choose another place",
        )


def existing(output: Path) -> OptionError:
    """Return the error for an output that is there already."""
    return OptionError(
        f"output {output}, which exists", "a path where nothing is", "remove it, or choose another"
    )


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder, which other processes may be writing."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size
    return size


def _check_work(folder: Path) -> None:
    try:
        if stat.S_ISDIR(folder.stat().st_mode):
            return
        reason = "it is no folder"
    except FileNotFoundError:
        if not folder.is_symlink():
            return
        reason = "it is a link that leads nowhere"
    except OSError as error:
        reason = str(error.strerror)
    raise OptionError(
        f"{folder}, where what is done is kept ({reason})",
        "a folder, or nothing",
        "remove it, or choose another output",
    )
