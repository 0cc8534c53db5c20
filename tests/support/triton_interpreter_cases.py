"""Runs the Triton kernel of ``dbf::sign_matmul`` on a CPU and prints, for every case, how far it was from the truth.

Triton reads ``TRITON_INTERPRET`` when it is imported. Hence this file is a program, started by :func:`run_all` with that
variable set; imported, it does not touch Triton.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: x is [*lead, K], signs are [N, K]."""

    lead: tuple[int, ...]
    N: int
    K: int
    dtype: str = "float32"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"[{','.join(map(str, (*self.lead, self.K)))}]-to-{self.N}-{self.dtype}-{self.layout}"


@dataclass(frozen=True)
class Report:
    """What one case showed.

    Attributes:
        poisoned: memory for results held NaN before the kernel ran.
        shape: shape of the result.
        dtype: dtype of the result.
        exact: integers, whose sums float32 holds exactly, came out exactly.
        worst: max |y - truth| / bound for normally distributed x; rounding explains at most 1.
        worst_with_wrong_sign: the same against a truth with one sign changed.
        exact_with_other_tiles: integers came out exactly with the tiles chosen for other numbers of rows.
        stays_inside: nothing around y was written.
    """

    poisoned: bool
    shape: list[int]
    dtype: str
    exact: bool
    worst: float
    worst_with_wrong_sign: float
    exact_with_other_tiles: bool
    stays_inside: bool


DTYPES = ("float32", "bfloat16", "float16")
# One, primes, whole words and tiles, one more and one less than those.
SHAPES = (
    ((1,), 1, 1),
    ((3,), 2, 31),
    ((1,), 16, 32),
    ((2,), 17, 33),
    ((5,), 13, 127),
    ((4,), 16, 128),
    ((7,), 31, 131),
    ((1,), 37, 257),
)
CASES = (
    *(Case(*shape, dtype) for shape, dtype in product(SHAPES, DTYPES)),
    *(
        Case((3, 5), 7, 45, dtype, layout)
        for dtype, layout in product(DTYPES, ("contiguous", "transposed", "sliced", "expanded"))
    ),
    Case((), 5, 40),
    Case((0,), 5, 40),
    Case((2, 0), 5, 40, "float16"),
    Case((3,), 0, 40),
    Case((3,), 5, 0),
)


def run_all() -> dict[str, Report]:
    """Run every case in a process of its own, where Triton interprets its kernels; return the reports by case."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the interpreter process failed:\n{done.stdout}{done.stderr}")
    return {name: Report(**fields) for name, fields in json.loads(done.stdout).items()}


def _report(case: Case) -> Report:
    from dbf_compile.kernels.sign_matmul.triton_kernel import sign_matmul_triton
    from dbf_compile.signs import pack_signs

    signs = torch.randint(0, 2, (case.N, case.K)) * 2 - 1
    # Around the words lie other signs: a kernel that reads them must mask them.
    words = _inside(pack_signs(signs), filler=0x5A5A5A5A)
    wrong_signs = signs.clone()
    wrong_signs[-1:, -1:] *= -1

    integers = _arranged(torch.randint(-8, 9, (*case.lead, case.K)), case)
    normal = _arranged(torch.randn(*case.lead, case.K), case)
    truth = integers.double() @ signs.double().T
    y = sign_matmul_triton(normal, words)
    others = [_launched_as_if(rows, integers, words, truth) for rows in (1, 64)]
    return Report(
        poisoned=bool(integers.new_empty(3, dtype=torch.float32).isnan().all()),
        shape=list(y.shape),
        dtype=str(y.dtype).removeprefix("torch."),
        exact=torch.equal(sign_matmul_triton(integers, words).double(), truth),
        worst=_worst(y, normal, signs),
        worst_with_wrong_sign=_worst(y, normal, wrong_signs),
        exact_with_other_tiles=all(exact for exact, _ in others),
        stays_inside=all(stays_inside for _, stays_inside in others),
    )


def _launched_as_if(rows: int, x: Tensor, words: Tensor, truth: Tensor) -> tuple[bool, bool]:
    """Launch with the tiles chosen for ``rows`` rows; return whether y is the truth, and its surroundings untouched."""
    from dbf_compile.kernels.sign_matmul.triton_kernel import block_sizes, grid, sign_matmul_kernel

    M, N, K = math.prod(x.shape[:-1]), words.shape[0], x.shape[-1]
    y = _inside(torch.full((M, N), math.nan), filler=math.nan)
    blocks = block_sizes(rows, N, K)
    if M * N:
        sign_matmul_kernel[grid(M, N, blocks)](x.contiguous(), words, y, M, N, K, **blocks)
    surroundings = y.new_empty(0).set_(y.untyped_storage())
    written = int((~surroundings.isnan()).sum())
    return torch.equal(y.double(), truth.reshape(M, N)), written == M * N


def _worst(y: Tensor, x: Tensor, signs: Tensor) -> float:
    # A sum of K terms in float32, in any order, errs by at most (K - 1) u Σ|x| / (1 - (K - 1) u) with u = 2⁻²⁴.
    bound = x.shape[-1] * 2.0**-24 * x.double().abs().sum(-1, keepdim=True)
    error = (y.double() - x.double() @ signs.double().T).abs()
    # NaN compares with nothing: turn it into an error that no bound covers.
    ratios = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf)
    return ratios.max().item() if ratios.numel() else 0.0


def _arranged(values: Tensor, case: Case) -> Tensor:
    """Cast to the case's dtype and lay out in memory as it asks; what lies between and around is NaN."""
    x = values.to(getattr(torch, case.dtype))
    match case.layout:
        case "transposed":
            return _inside(x.mT, filler=math.nan).mT
        case "sliced":
            wide = x.new_full((*x.shape[:-1], case.K + 3), math.nan)
            wide[..., : case.K] = x
            return wide[..., : case.K]
        case "expanded":
            return _inside(x[:1], filler=math.nan).expand(x.shape)
        case _:
            return _inside(x, filler=math.nan)


def _inside(values: Tensor, filler: float) -> Tensor:
    """Copy into the middle of a larger memory full of ``filler``."""
    margin = 4096
    memory = values.new_full((values.numel() + 2 * margin,), filler)
    middle = memory[margin : margin + values.numel()].view(values.shape)
    return middle.copy_(values)


def main() -> None:
    """Print the reports of all cases as JSON."""
    # Deterministic algorithms fill new memory with NaN: a lane the kernel forgets is seen.
    torch.use_deterministic_algorithms(True)
    reports = {}
    for case in CASES:
        torch.manual_seed(0)
        reports[str(case)] = asdict(_report(case))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
