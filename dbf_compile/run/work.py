"""The durable results of one compression. Any number of processes make them together; any later run continues with them.

    <folder>/manifest.json            what the results depend on: fingerprints of model, data, settings and program
    <folder>/<result>                 a result: whole, or not there; one that was damaged since is made again
    <folder>/locks/<result>.lock      held by the process that is making it
    <folder>/unfinished/              the compressed model while it is written

A process that needs a missing result locks it, checks again, computes it and renames it into place. The operating system
releases the lock of a process that dies; the next process makes the result. So there is no server, no role, and nothing to
clean up after a crash: processes of one machine, ranks of a cluster with a common file system and a run that was killed
yesterday are one case.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError, safe_open

from dbf_compile.checkpoint import load, read_metadata, save
from dbf_compile.checksums import changed_tensors
from dbf_compile.compression.jobs import FactorJob
from dbf_compile.errors import CheckpointError, ResumeError
from dbf_compile.factorizer.factorize import weighted_error
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.files import write_text

_MANIFEST = "manifest.json"
_FACTS = "facts"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system without locks answers

_log = logging.getLogger(__name__)

# Factors by layer name, and facts that JSON can hold.
Result = tuple[dict[str, DoubleBinaryFactors], dict[str, Any]]


class Work:
    """Results in a folder, by name.

    Args:
        folder: where they lie; made if it is not there.
        fingerprint: what all of them depend on, by name: "model", "data", "settings", "program".
        resume: "auto" continues with what is there, "required" insists that something is there, "never" removes it.

    Raises:
        ResumeError: what is there belongs to another model, other data or other settings; or nothing is there.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], resume: str = "auto") -> None:
        self.folder = folder
        manifest = folder / _MANIFEST
        expected = json.loads(json.dumps(dict(fingerprint)))
        if resume == "required" and not manifest.exists():
            raise ResumeError(
                f"no interrupted run in {folder}", "a folder with a manifest.json", "leave resume at 'auto'"
            )
        if resume == "never":
            remove_work(folder)
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with self._lock(_MANIFEST):
            if not manifest.exists():
                write_text(manifest, json.dumps(expected, indent=1))
        stored = _read_json(manifest)
        changed = [key for key in {**expected, **stored} if stored.get(key) != expected.get(key)]
        if changed:
            others = [_difference(key, stored.get(key), expected.get(key)) for key in changed]
            raise ResumeError(
                f"an interrupted run in {folder} with {', '.join(others)}",
                "the model, the data and the settings it was begun with",
                "choose another output, or resume='never' to start over",
            )
        for path in folder.iterdir():
            if path.is_file() and not _is_whole(path):
                _log.warning("%s is damaged, and is made again", path)
                path.unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the path of a result. If it is not there, make it, or wait for the process that is making it.

        Args:
            name: of the result, a file name.
            make: writes the result to the path it is given, whole or not at all.
        """
        path = self.folder / name
        if not path.exists():
            with self._lock(name):
                if not path.exists():
                    make(path)
        return path

    def once_if_free(self, name: str, make: Callable[[Path], object]) -> bool:
        """Make a result as :meth:`once` does, unless it is there or another process is making it; return whether it was made."""
        path = self.folder / name
        if path.exists():
            return False
        with self._lock(name, wait=False) as held:
            if not held or path.exists():
                return False
            make(path)
        return True

    def factors(self, name: str, make: Callable[[], Result]) -> Result:
        """Return the factors and facts kept under ``name``; make them if they are not there, as :meth:`once` does."""
        return _read(self.once(_file(name), lambda path: _write(path, *make())))

    def read(self, name: str) -> Result:
        """Return the factors and facts kept under ``name``.

        Raises:
            CheckpointError: they are not there, or damaged.
        """
        return _read(self.folder / _file(name))

    def has(self, name: str) -> bool:
        """Return whether the factors ``name`` are there."""
        return (self.folder / _file(name)).exists()

    @contextmanager
    def claim(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Lock factors; yield the names of those that nobody has made or is making."""
        with ExitStack() as stack:
            yield [
                name
                for name in names
                if not self.has(name)
                and stack.enter_context(self._lock(_file(name), wait=False))
                and not self.has(name)  # another process may have finished before the lock was free
            ]

    def put(self, name: str, factors: Mapping[str, DoubleBinaryFactors], facts: Mapping[str, Any]) -> None:
        """Keep factors and facts under ``name``, which the caller has claimed."""
        _write(self.folder / _file(name), factors, facts)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Let one process at a time into the block ``name``; the others wait."""
        with self._lock(name):
            yield

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let this process into the block ``name``, unless another one is in it.

        Raises:
            ResumeError: it is.
        """
        with self._lock(name, wait=False) as held:
            if not held:
                raise _at_work(self.folder)
            yield

    def new_folder(self, name: str) -> Path:
        """Return an empty folder of that name; one process at a time may call this. What a killed one left is removed.

        It lies on the disk of the output, and can be moved there. No two calls return the same path: where locks of one
        machine are not seen by another, neither moves what the other has begun.
        """
        place = self.folder / "unfinished"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        folder = Path(tempfile.mkdtemp(dir=place)) / name
        folder.mkdir()
        return folder

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Yield whether the lock is held; without ``wait`` it is not while another process holds it."""
        lock = FileLock(self.folder / "locks" / f"{name}.lock")
        if not _acquired(lock, wait):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _acquired(lock: BaseFileLock, wait: bool) -> bool:
    """Acquire a lock, and return whether it is held.

    Raises:
        CheckpointError: the file system has none that are released when their holder dies.
    """
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return False
    except NotImplementedError as error:  # of older releases of filelock
        raise _without_locks(lock) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _without_locks(lock) from error
        raise
    if isinstance(
        lock, SoftFileLock
    ):  # what newer releases make of a lock where there are none: it outlives its holder
        lock.release()
        raise _without_locks(lock)
    return True


def _without_locks(lock: BaseFileLock) -> CheckpointError:
    return CheckpointError(
        f"{lock.lock_file} on a file system without locks",
        "one that locks files (flock), for all machines that share the work",
        "choose an output elsewhere, or mount this file system with locks",
    )


def remove_work(folder: Path) -> None:
    """Remove what is kept in a folder, to start over.

    Raises:
        ResumeError: another process is at work there.
    """
    for path in folder.glob("locks/*.lock"):
        lock = FileLock(path)
        if not _acquired(lock, wait=False):
            raise _at_work(folder)
        lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def _at_work(folder: Path) -> ResumeError:
    return ResumeError(
        f"{folder}, in which another process is at work",
        "a folder that nobody works in",
        "wait for it, stop it, or choose another output",
    )


class WorkStore:
    """The store of the factoring engine that keeps results as :class:`Work`, for all processes of a run.

    Args:
        work: where results lie, each under the name of its first layer.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def key(self, job: FactorJob) -> str:
        """Return the name of the first layer."""
        return job.names[0]

    def has(self, key: str) -> bool:
        """Return whether the factors are there."""
        return self._work.has(key)

    @contextmanager
    def claim(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Lock results; yield those that no process has made or is making."""
        with self._work.claim(keys) as claimed:
            yield claimed

    def put(self, key: str, job: FactorJob, factors: DoubleBinaryFactors, seconds: float) -> None:
        """Keep the factors of every layer, with the weighted error and the seconds of the job."""
        weight = job.stacked.to(factors.scale_in.device)
        facts = {
            "errors": {job.name: weighted_error(weight, factors, job.importance)},
            "seconds": {job.name: round(seconds, 3)},
            "stages": [],
        }
        parts = factors.to("cpu").split(job.rows)
        self._work.put(key, dict(zip(job.names, parts, strict=True)), facts)


def _difference(key: str, stored: Any, expected: Any) -> str:
    """Return in words what an interrupted run had other than this one."""
    if not (isinstance(stored, dict) and isinstance(expected, dict)):
        return f"another {key}"
    absent = "nothing"
    fields = [
        f"{name}={stored.get(name, absent)!r} instead of {expected.get(name, absent)!r}"
        for name in sorted({*stored, *expected})
        if stored.get(name, absent) != expected.get(name, absent)
    ]
    return f"other {key} ({', '.join(fields)})"


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _write(path: Path, factors: Mapping[str, DoubleBinaryFactors], facts: Mapping[str, Any]) -> None:
    save(factors, path, {_FACTS: json.dumps(facts)})


def _read(path: Path) -> Result:
    try:
        return load(path), json.loads(read_metadata(path)[_FACTS])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} without facts ({error})", "a result of a compression", "let it be made again"
        ) from error


def _is_whole(path: Path) -> bool:
    """Return whether a result is as it was written."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return not changed_tensors(path)
        json.loads(path.read_text())
    except FileNotFoundError:  # another process has removed it
        return True
    except (SafetensorError, ValueError):
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise ResumeError(
        f"an unreadable {path}", "the JSON that a compression wrote", "resume='never' to start over"
    )
