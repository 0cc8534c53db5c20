"""The C++ kernels on random shapes under the sanitizers of the compiler, on every instruction set that is here."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from soak_cases import Campaign, Case, in_processes

from dbf_compile.kernels import cpp_build

CHECK = Path(__file__).parents[1] / "tests" / "support" / "cpu_check.cpp"
HEADERS = Path(cpp_build.__file__).parent / "sign_matmul"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
SECONDS = 60  # of one process, in time of the processor
PATIENCE = 3600  # seconds: the processor may be held by others


def run(seeds: Iterable[int], quick: bool) -> Iterator[Case]:
    """Yield a minute of random shapes for each seed, in time of the processor."""
    compiler = cpp_build.compiler()
    if compiler is None:
        raise SystemExit("no C++ compiler")
    seconds = CAMPAIGN.quick if quick else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "check"
        flags = [flag for flag in cpp_build.FLAGS if flag != "-O3"]
        command = [compiler, *flags, *SANITIZERS, f"-I{HEADERS}", str(CHECK), "-o", str(program)]
        subprocess.run(command, check=True)
        yield from in_processes(seeds, partial(_case, program, seconds), timeout=PATIENCE)


def _case(program: Path, seconds: int, seed: int) -> Case:
    command = [str(program), str(seed), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checked = ", ".join(line for line in done.stdout.splitlines() if line.endswith("random shapes wrong"))
    what = "exact and fast, signs in both orders"
    if done.returncode == 0:
        return Case(seed, what, "right, nothing out of bounds", False, checked, seconds)
    detail = (done.stdout[-500:] + done.stderr[:1500]).strip()
    return Case(seed, what, "WRONG" if done.returncode == 1 else "OUT OF BOUNDS", True, detail, seconds)


CAMPAIGN = Campaign("processor seconds", 3600, 1, run)
