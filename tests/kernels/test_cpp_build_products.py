"""The CPU kernels without torch: under sanitizers, and for a processor that this machine does not have."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from dbf_compile.kernels import cpp_build

PROGRAMS = Path(__file__).parents[1] / "support" / "native"
HEADERS = Path(cpp_build.__file__).parent
KERNELS = ("sign_matmul", "row_matmul", "cached_attention", "factor_update")
PLAIN = ("factor_update",)  # loops that the compiler makes vectors of
# Without -O3, which takes long. GCC takes what its own intrinsics leave undefined for a mistake.
FLAGS = [
    *(flag for flag in cpp_build.FLAGS if flag != "-O3"),
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
COMPILER = cpp_build.compiler()
COMPILERS = {platform.machine(): COMPILER}
COMPILERS.setdefault("aarch64", shutil.which("aarch64-linux-gnu-g++"))
INTRINSICS_OF = {"cpu_amx.h": "x86_64", "cpu_avx.h": "x86_64", "cpu_neon.h": "aarch64"}
SANITIZERS = {
    # With optimization, checks of undefined behaviour take the compiler three times as long.
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g1"),
    "races": ("-fsanitize=thread", "-O1", "-g"),
}

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")


def build(compiler: str | None, kernel: str, path: Path, *flags: str, headers: Path | None = None) -> Path:
    assert compiler is not None
    source = PROGRAMS / f"{kernel}.cpp"
    command = [compiler, *FLAGS, *flags, f"-I{headers or HEADERS / kernel}", str(source), "-o", str(path)]
    # A compiler for another processor would take the linker of this one from COMPILER_PATH.
    environment = {name: value for name, value in os.environ.items() if name != "COMPILER_PATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return path


def check(*command: str, kernels: set[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    checked = {line.partition(":")[0] for line in done.stdout.splitlines() if ": 0 of" in line}
    assert kernels <= checked


@pytest.mark.parametrize("processor", COMPILERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_header_compiles_alone(kernel: str, processor: str) -> None:
    compiler = COMPILERS[processor]
    if compiler is None:
        pytest.skip(f"no compiler for {processor}")
    for header in sorted((HEADERS / kernel).glob("*.h")):
        if INTRINSICS_OF.get(header.name, processor) == processor:
            command = [compiler, *FLAGS, "-Werror", "-fsyntax-only", f"-I{header.parent}", "-x", "c++", "-"]
            text = f'#include "{header.name}"\n'
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            assert done.returncode == 0, f"{header.name}: {done.stderr[-4000:]}"


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="sanitizers are tried with the compilers of Linux")
@pytest.mark.parametrize(
    ("kernel", "sanitizer"), [*((kernel, "memory") for kernel in KERNELS), ("sign_matmul", "races")]
)
def test_random_shapes_are_right_and_nothing_is_out_of_bounds(
    kernel: str, sanitizer: str, tmp_path: Path
) -> None:
    """For a second; `make soak` goes on for an hour."""
    program = build(COMPILER, kernel, tmp_path / "check", *SANITIZERS[sanitizer])
    check(str(program), "0", "1", kernels={"portable"})


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for 64-bit Arm")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_for_arm_under_an_emulator(kernel: str, tmp_path: Path) -> None:
    program = build("aarch64-linux-gnu-g++", kernel, tmp_path / "check", "-static", "-O1")
    check("qemu-aarch64", str(program), kernels={"portable"} if kernel in PLAIN else {"neon", "portable"})


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="only plain C++ runs here")
@pytest.mark.parametrize(
    ("kernel", "header", "right", "wrong"),
    [
        ("sign_matmul", "cpu_bytes.h", "upper[p] = add16(upper[p], high_bytes(sum));", ""),
        (
            "cached_attention",
            "cpu_attention.h",
            "std::min((end + kBlock - 1) / kBlock * kBlock, L)",
            "end + kBlock",
        ),
        ("factor_update", "cpu_update.h", "i < even; i += kLanes", "i < count; i += kLanes"),
    ],
    ids=["wrong sums", "keys behind the last", "columns behind the last"],
)
def test_the_check_sees_a_fault(kernel: str, header: str, right: str, wrong: str, tmp_path: Path) -> None:
    """Without a sanitizer, too."""
    spoilt = Path(shutil.copytree(HEADERS, tmp_path / "headers"), kernel, header)
    assert right in spoilt.read_text()
    spoilt.write_text(spoilt.read_text().replace(right, wrong))
    program = build(COMPILER, kernel, tmp_path / "check", "-O1", headers=spoilt.parent)
    assert subprocess.run([str(program)], capture_output=True).returncode != 0
