"""Builds C++ files of the tests' support that register something with torch."""

import subprocess
from pathlib import Path

import torch


def build(source: Path, folder: Path) -> Path:
    """Build the shared library of ``source`` in ``folder`` unless it is there, and return its path."""
    library = folder / f"{source.stem}.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        linked = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", *linked]
        subprocess.run(["c++", *include, str(source), "-o", str(library), *flags], check=True)
    return library
