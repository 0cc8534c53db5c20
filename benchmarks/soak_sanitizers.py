"""The C++ kernels on random shapes under the sanitizers of the compiler, on every instruction set that is here.

Each kernel is checked without torch by a program of ``tests/support/native``, for memory and undefined behaviour and for races
of its threads. The operators of torch around them are called from Python, in a process that has the sanitizer preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from soak_cases import Campaign, Case, in_processes

from dbf_compile.kernels import cpp_build

PROGRAMS = Path(__file__).parents[1] / "tests" / "support" / "native"
OPERATORS = Path(__file__).with_name("soak_operators.py")
HEADERS = Path(cpp_build.__file__).parent
KERNELS = ("sign_matmul", "row_matmul", "cached_attention")
SANITIZERS = {
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-fsanitize=thread",),
}
SECONDS = 60  # of one process, in time of the processor
PATIENCE = 3600  # seconds: the processor may be held by others
FAULT = 66  # the exit code of a sanitizer; 1 says that a result is wrong


@dataclass(frozen=True)
class Part:
    """What a case runs: a kernel without torch, or the operators of all.

    Args:
        kernel: its name; None for the operators.
        sanitizer: of ``SANITIZERS``.
    """

    kernel: str | None
    sanitizer: str

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.kernel or 'operators of torch'}: {self.sanitizer}"

    def build(self, compiler: str, folder: Path) -> None:
        """Compile what is missing."""
        flags = [*SANITIZERS[self.sanitizer], "-O1", "-g"]
        if self.kernel is None:
            wrapper = folder / "compiler"
            if not wrapper.exists():
                wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" {" ".join(flags)}\n')
                wrapper.chmod(0o700)
                subprocess.run([sys.executable, OPERATORS], env=self._environment(folder), check=True)
        elif not (program := folder / self.name).exists():
            flags = [flag for flag in cpp_build.FLAGS if flag != "-O3"] + flags
            source = PROGRAMS / f"{self.kernel}.cpp"
            subprocess.run(
                [compiler, *flags, f"-I{HEADERS / self.kernel}", source, "-o", program], check=True
            )

    def run(self, folder: Path, compiler: str, seed: int, seconds: int) -> subprocess.CompletedProcess[str]:
        """Check random shapes for so many seconds."""
        environment = self._environment(folder)
        command = [str(folder / self.name)]
        if self.kernel is None:
            command = [sys.executable, str(OPERATORS)]
            # Before Python, which has no sanitizer; and what throws, before the sanitizer looks for it.
            environment["LD_PRELOAD"] = (
                f"{_library(compiler, 'libasan.so')} {_library(compiler, 'libstdc++.so')}"
            )
        return subprocess.run(
            [*command, str(seed), str(seconds)], env=environment, capture_output=True, text=True, check=False
        )

    def _environment(self, folder: Path) -> dict[str, str]:
        common = f"exitcode={FAULT}"
        # Python frees nothing at its end, and torch brings two copies of some names.
        python = ":detect_leaks=0:detect_odr_violation=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0"
        return {
            **os.environ,
            "ASAN_OPTIONS": common + (python if self.kernel is None else ""),
            "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
            "TSAN_OPTIONS": common,
            "CXX": str(folder / "compiler"),
            "DBF_CACHE_DIR": str(folder / "cache"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }


PARTS = [
    *(Part(kernel, sanitizer) for sanitizer in SANITIZERS for kernel in KERNELS),
    Part(None, "memory"),
]


def run(seeds: Iterable[int], quick: bool) -> Iterator[Case]:
    """Yield a minute of random shapes for each seed, in time of the processor; one part after the other."""
    compiler = cpp_build.compiler()
    if compiler is None:
        raise SystemExit("no C++ compiler")
    seconds = 1 if quick else SECONDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def built() -> Iterator[int]:
            for seed in seeds:
                PARTS[seed % len(PARTS)].build(compiler, folder)
                yield seed

        yield from in_processes(built(), partial(_case, folder, compiler, seconds), timeout=PATIENCE)


def _library(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _case(folder: Path, compiler: str, seconds: int, seed: int) -> Case:
    part = PARTS[seed % len(PARTS)]
    done = part.run(folder, compiler, seed, seconds)
    if done.returncode == 0:
        checked = ", ".join(line for line in done.stdout.splitlines() if line.endswith("wrong"))
        return Case(seed, part.name, "right, nothing out of bounds, no race", False, checked, seconds)
    detail = f"exit code {done.returncode}: {done.stdout[-500:]}{done.stderr[:1500]}".strip()
    return Case(seed, part.name, "WRONG" if done.returncode == 1 else "A FAULT", True, detail, seconds)


CAMPAIGN = Campaign("processor seconds", 3600, len(PARTS), run)
