"""Builds the C++ kernels once per machine and caches the libraries.

* Nothing is built at import or at installation: the wheel is pure Python.
* The name of a library is a fingerprint of sources, flags, torch version and architecture, then of the compiler, then of
  the library itself. So a changed source is built again, a shared home folder may hold the libraries of several machines, a
  damaged library is not loaded, and one that was built before needs no compiler.
* One process builds a library, others wait for it. It is renamed into place: a killed process leaves no broken file.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from dbf_compile.errors import BuildError
from dbf_compile.files import cache_folder, one_at_a_time

# -ffp-contract=off: fused multiply-adds would give other bits. No -march: kernels choose an instruction set at run time.
# -fvisibility=hidden: compiled programs find the C functions of all libraries, which share no other names.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi")

TIMEOUT_SECONDS = 300  # a build takes half a minute; eight times that on a busy machine


def compiler() -> str | None:
    """Return the path of the C++ compiler: ``$CXX``, else c++, g++ or clang++; None if there is none."""
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else ("c++", "g++", "clang++")
    return next((path for name in candidates if (path := shutil.which(name))), None)


def build(source: Path) -> Path:
    """Return the shared library of a C++ file; compile it unless it is cached.

    Args:
        source: registers operators through torch's stable ABI; it may include headers of its folder and of this one.

    Returns:
        The library: in the ``native`` folder of the cache or, where that cannot be written, in a temporary folder of this
        process. One that another compiler has built serves where there is none, or where it fails.

    Raises:
        BuildError: no compiler, no writable folder, or the compiler failed; the message has its output.
    """
    sources = [source, *sorted(source.parent.glob("*.h")), *sorted(Path(__file__).parent.glob("*.h"))]
    platform_name = " ".join([*FLAGS, _target_version(), torch.__version__, platform.machine()])
    stem = f"{source.stem}-{_digest(platform_name.encode(), *(_signed(file) for file in sources))}"
    folder = cache_folder() / "native"
    try:
        command = _command()
        of_compiler = f"{stem}-{_digest(command[0].encode())}"
        return _cached(folder, of_compiler) or _compile(command, source, folder, of_compiler)
    except BuildError:
        if (library := _cached(folder, stem)) is None:
            raise
        return library


class Library:
    """The operators of a C++ file: built and loaded when they are first asked for, once per process.

    Args:
        source: as of :func:`build`.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._is_loaded: bool | None = None
        self._renew_lock()
        if hasattr(os, "register_at_fork"):  # another thread may be building while this one forks
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def available(self) -> bool:
        """Return whether the operators are there; warn once if this machine cannot build or load them."""
        if self._is_loaded is None:
            # Of several threads one builds and loads: a second copy of the library would register its operators again.
            with self._lock:
                if self._is_loaded is None:
                    self._is_loaded = self._load()
        return self._is_loaded

    def _load(self) -> bool:
        try:
            library = build(self.source)
            torch.ops.load_library(library)
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # for compiled programs, which call its C functions
        except (BuildError, OSError) as error:  # OSError: the loader refuses the library
            warnings.warn(f"dbf_compile falls back to its slow reference kernel: {error}", stacklevel=4)
            return False
        return True


def _signed(file: Path) -> bytes:
    return file.name.encode() + b"\0" + file.read_bytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _cached(folder: Path, stem: str) -> Path | None:
    """Return a library whose content is that of its name: loading half of one would end the process."""
    try:
        for library in sorted(folder.glob(f"{stem}-*.so")):
            if library.stem.endswith("-" + _digest(library.read_bytes())):
                return library
    except OSError:  # a folder or a file of somebody else
        pass
    return None


def _compile(command: list[str], source: Path, folder: Path, stem: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build_folder = tempfile.mkdtemp(dir=folder)
    except OSError:
        folder = Path(_temporary_folder())
        build_folder = tempfile.mkdtemp(dir=folder)
    try:
        # Processes that start together need the same library. To build it twice does no harm.
        with one_at_a_time(folder / f"{stem}.lock", TIMEOUT_SECONDS):
            if (ready := _cached(folder, stem)) is not None:
                return ready
            partial = Path(build_folder) / f"{source.stem}.so"
            log = Path(build_folder) / "log"
            _run([*command, str(source), "-o", str(partial), *_link_flags()], source.name, log)
            content = partial.read_bytes()
            library = folder / f"{stem}-{_digest(content)}.so"
            if (
                not library.exists() or library.read_bytes() != content
            ):  # else another process may have loaded it
                partial.replace(library)
            return library
    except OSError as error:
        raise BuildError(
            f"building {source.name} in {folder} failed ({error})",
            "a writable folder with space and a compiler that runs",
            "choose others with the environment variables DBF_CACHE_DIR and CXX",
        ) from error
    finally:
        shutil.rmtree(build_folder, ignore_errors=True)


def _temporary_folder() -> str:
    try:
        folder = tempfile.mkdtemp(prefix="dbf_compile-")
    except OSError as error:
        raise BuildError(
            f"no folder for the C++ kernels: neither {cache_folder()} nor a temporary one can be written ({error})",
            "a writable folder",
            "choose one with the environment variables DBF_CACHE_DIR and TMPDIR",
        ) from error
    warnings.warn(
        f"{cache_folder()} cannot be written: every process builds its C++ kernels; choose a folder with DBF_CACHE_DIR",
        stacklevel=2,
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str], name: str, log: Path) -> None:
    """Run the compiler, with its output in a file: a pipe would be held open by what it leaves running."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            status: int | str = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"no end after {TIMEOUT_SECONDS} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status != 0:
        text = log.read_text(errors="replace").strip()[-4000:]
        raise BuildError(
            f"the C++ compiler failed on {name}:\n{text or status}",
            "a compiler with C++20, such as g++ >= 11 or clang++ >= 14",
            "choose another compiler with the environment variable CXX",
        )


def _command() -> list[str]:
    path = compiler()
    if path is None:
        raise BuildError(
            f"no C++ compiler (CXX={os.environ.get('CXX')!r})",
            "g++ >= 11 or clang++ >= 14 on the PATH",
            "install one, or set CXX; until then the slow reference is used",
        )
    abi = f"-DTORCH_TARGET_VERSION={_target_version()}"
    headers = Path(torch.__file__).parent / "include"  # of the stable ABI; importing cpp_extension takes long
    return [path, *FLAGS, abi, "-shared", "-fPIC", f"-I{headers}"]


def _link_flags() -> list[str]:
    if platform.system() == "Darwin":
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def _target_version() -> str:
    # The oldest torch whose stable ABI has everything that the kernels call.
    return "0x020b000000000000"
