"""The CPU kernels without torch: under sanitizers, and for a processor that this machine does not have."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from dbf_compile.kernels import cpp_build

CHECK = Path(__file__).parents[2] / "support" / "cpu_check.cpp"
HEADERS = Path(cpp_build.__file__).parent / "sign_matmul"
FLAGS = [flag for flag in cpp_build.FLAGS if flag != "-O3"]


def build(compiler: str, path: Path, *flags: str, headers: Path = HEADERS) -> Path:
    command = [compiler, *FLAGS, "-Wall", "-Wextra", *flags, f"-I{headers}", str(CHECK), "-o", str(path)]
    # A compiler for another processor would take the linker of this one from COMPILER_PATH.
    environment = {name: value for name, value in os.environ.items() if name != "COMPILER_PATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return path


def check(*command: str, kernels: set[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    checked = {line.partition(":")[0] for line in done.stdout.splitlines() if "of 72 cases wrong" in line}
    assert kernels <= checked


COMPILERS = {platform.machine(): cpp_build.compiler()}
COMPILERS.setdefault("aarch64", shutil.which("aarch64-linux-gnu-g++"))
INTRINSICS_OF = {"cpu_avx.h": "x86_64", "cpu_neon.h": "aarch64"}


@pytest.mark.slow
@pytest.mark.parametrize("processor", COMPILERS)
@pytest.mark.parametrize("header", sorted(path.name for path in HEADERS.glob("*.h")))
def test_every_header_compiles_alone(header: str, processor: str) -> None:
    compiler = COMPILERS[processor]
    if compiler is None or INTRINSICS_OF.get(header, processor) != processor:
        pytest.skip(f"no compiler for {processor}, or the header is for another processor")
    command = [
        compiler,
        *FLAGS,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{HEADERS}",
        "-x",
        "c++",
        "-",
    ]
    done = subprocess.run(command, input=f'#include "{header}"\n', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(cpp_build.compiler() is None, reason="this machine has no C++ compiler")
@pytest.mark.skipif(platform.system() != "Linux", reason="sanitizers are tried with the compilers of Linux")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    compiler = cpp_build.compiler()
    assert compiler is not None
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
    program = build(compiler, tmp_path / "check", *sanitizers)
    check(str(program), kernels={"portable"})
    # Random shapes, for a second; `make soak` goes on for an hour.
    done = subprocess.run([str(program), "0", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "portable: 0 of" in done.stdout and "random shapes wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for 64-bit Arm")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64")
def test_the_kernel_for_arm_under_an_emulator(tmp_path: Path) -> None:
    program = build("aarch64-linux-gnu-g++", tmp_path / "check", "-static", "-O2")
    check("qemu-aarch64", str(program), kernels={"neon", "portable"})


@pytest.mark.slow
@pytest.mark.skipif(cpp_build.compiler() is None, reason="this machine has no C++ compiler")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="only plain C++ runs here")
def test_the_check_sees_a_wrong_kernel(tmp_path: Path) -> None:
    compiler = cpp_build.compiler()
    assert compiler is not None
    spoilt = Path(shutil.copytree(HEADERS, tmp_path / "headers"), "cpu_bytes.h")
    right = "upper[p] = add16(upper[p], high_bytes(sum));"
    assert right in spoilt.read_text()
    spoilt.write_text(spoilt.read_text().replace(right, ""))
    program = build(compiler, tmp_path / "check", "-O1", headers=spoilt.parent)
    assert subprocess.run([str(program)], capture_output=True).returncode == 1
