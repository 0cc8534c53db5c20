"""Builds the C++ kernels once per machine and caches the libraries.

* Nothing is built at import or at installation: the wheel is pure Python.
* The name of a library is a fingerprint of sources, compiler command, torch version and architecture. So a changed source
  is built again, and a shared home folder may hold the libraries of several machines.
* A library is renamed into place: two processes may build at once, and a killed one leaves no broken file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from dbf_compile.errors import BuildError
from dbf_compile.files import cache_folder

# -ffp-contract=off: fused multiply-adds would give other bits. No -march: kernels choose an instruction set at run time.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")


def compiler() -> str | None:
    """Return the path of the C++ compiler: ``$CXX``, else c++, g++ or clang++; None if there is none."""
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else ("c++", "g++", "clang++")
    return next((path for name in candidates if (path := shutil.which(name))), None)


def build(source: Path) -> Path:
    """Return the shared library of a C++ file; compile it unless it is cached.

    Args:
        source: registers operators through torch's stable ABI; it may include headers of its folder.

    Returns:
        The library, in the ``native`` folder of the cache.

    Raises:
        BuildError: no compiler, no writable folder, or the compiler failed; the message has its output.
    """
    command = _command()
    digest = hashlib.sha256()
    sources = [source, *sorted(source.parent.glob("*.h"))]
    settings = " ".join([*command, torch.__version__, platform.machine()]).encode()
    for part in (*(file.name.encode() + b"\0" + file.read_bytes() for file in sources), settings):
        digest.update(hashlib.sha256(part).digest())
    library = cache_folder() / "native" / f"{source.stem}-{digest.hexdigest()[:32]}.so"
    try:
        if not library.exists():
            _compile(command, source, library)
    except OSError as error:
        raise BuildError(
            f"building {library} failed ({error})",
            "a writable folder and a compiler that runs",
            "choose others with the environment variables DBF_CACHE_DIR and CXX",
        ) from error
    return library


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        done = subprocess.run(
            [*command, str(source), "-o", str(partial), *_link_flags()], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise BuildError(
                f"the C++ compiler failed on {source.name}:\n{done.stderr.strip()[-4000:]}",
                "a compiler with C++20, such as g++ >= 11 or clang++ >= 14",
                "choose another compiler with the environment variable CXX",
            )
        partial.replace(library)


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
