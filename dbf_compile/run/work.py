"""The durable results of one compression, which any number of processes make together and any later run goes on with.

    <folder>/manifest.json            what the results depend on: fingerprints of model, data and settings
    <folder>/<result>                 a result: whole, or not there; one that the disk has damaged since is made again
    <folder>/locks/<result>.lock      held by the process that is making it

Who wants a result that is not there takes its lock, looks again, makes it, and moves it into place. The operating system
lets go of the lock of a process that dies, and whoever comes next makes the result anew. So there is no server, no role,
and nothing to clean up after a crash; processes of one machine, ranks of a cluster with a common file system and a run
that was killed yesterday are all the same case.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from dbf_compile.checkpoint import load, read_metadata, save
from dbf_compile.errors import CheckpointError, ResumeError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.files import write_text

RESUME = ("auto", "required", "never")
_MANIFEST = "manifest.json"
_FACTS = "facts"

_log = logging.getLogger(__name__)

Made = tuple[dict[str, DoubleBinaryFactors], dict[str, Any]]


class Work:
    """Results in a folder, by name.

    Args:
        folder: where they lie; made if it is not there.
        fingerprint: what all of them depend on, by name of what it stands for: "model", "data", "settings".
        resume: "auto" goes on with what is there, "required" insists that something is there, "never" starts over and
            removes it.

    Raises:
        ResumeError: what is there belongs to another model, other data or other settings; or nothing is there.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], resume: str = "auto") -> None:
        self.folder = folder
        manifest = folder / _MANIFEST
        wanted = json.loads(json.dumps(dict(fingerprint)))
        if resume == "required" and not manifest.exists():
            raise ResumeError(
                f"no interrupted run in {folder}", "a folder with a manifest.json", "leave resume at 'auto'"
            )
        if resume == "never":
            shutil.rmtree(folder, ignore_errors=True)
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with self._lock(_MANIFEST):
            if not manifest.exists():
                write_text(manifest, json.dumps(wanted, indent=1))
        found = _read_json(manifest)
        changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if changed:
            raise ResumeError(
                f"an interrupted run in {folder} with another {', '.join(changed)}",
                "the model, the data and the settings it was begun with",
                "choose another output, or resume='never' to start over",
            )
        for path in folder.iterdir():
            if path.is_file() and not _whole(path):
                _log.warning("%s is damaged, and is made again", path)
                path.unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the path of a result after making it, or waiting for who is making it, if it is not there.

        Args:
            name: of the result, a file name.
            make: writes it to the path it is given, whole or not at all.
        """
        self._make(name, make, wait=True)
        return self.folder / name

    def factors(self, name: str, make: Callable[[], Made]) -> Made:
        """Return the factors and facts kept under ``name`` after making them if they are not there."""
        return _read(self.once(_file(name), lambda path: _write(path, *make())))

    def all_factors(self, names: Sequence[str], make: Callable[[str], Made]) -> None:
        """Make all factors that are not there, leaving alone what others are making; at the end all are there.

        Args:
            names: of the factors.
            make: makes those of one name.
        """
        for wait in (False, True):  # at last wait for the others, and take over from those that died
            for name in names:
                self._make(_file(name), lambda path, name=name: _write(path, *make(name)), wait)  # type: ignore[misc]

    def read(self, name: str) -> Made:
        """Return the factors and facts kept under ``name``.

        Raises:
            CheckpointError: they are not there, or damaged.
        """
        return _read(self.folder / _file(name))

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Let one process at a time into the block, by the name of what it does there."""
        with self._lock(name):
            yield

    def has(self, name: str) -> bool:
        """Return whether the factors ``name`` are there."""
        return (self.folder / _file(name)).exists()

    def _make(self, name: str, make: Callable[[Path], object], wait: bool) -> None:
        path = self.folder / name
        if not path.exists():
            with self._lock(name, wait) as held:
                if held and not path.exists():
                    make(path)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Yield whether the lock is held, which without ``wait`` it is not while another holds it."""
        lock = FileLock(self.folder / "locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _write(path: Path, factors: Mapping[str, DoubleBinaryFactors], facts: Mapping[str, Any]) -> None:
    save(factors, path, {_FACTS: json.dumps(facts)})


def _read(path: Path) -> Made:
    try:
        return load(path), json.loads(read_metadata(path)[_FACTS])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} without facts ({error})", "a result of a compression", "let it be made again"
        ) from error


def _whole(path: Path) -> bool:
    """Return whether a result can be opened; its numbers are not read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        json.loads(path.read_text())
    except FileNotFoundError:  # another process has removed it
        return True
    except (SafetensorError, ValueError):
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise ResumeError(
        f"an unreadable {path}", "the JSON that a compression wrote", "resume='never' to start over"
    )
