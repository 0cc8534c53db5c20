"""Runs the Triton kernel of ``dbf::sign_matmul`` on a CPU and prints, for every case, how far off it was.

Triton reads ``TRITON_INTERPRET`` when it is imported. Hence this file is a program, which :func:`run_all`
starts with that variable set; imported, it does not touch Triton.

A read or write behind the end of a tensor kills the program: see :func:`_at_the_edge`.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
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
        return f"{'x'.join(map(str, (*self.lead, self.K)))}-to-{self.N}-{self.dtype}-{self.layout}"


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
    """

    poisoned: bool
    shape: list[int]
    dtype: str
    exact: bool
    worst: float
    worst_with_wrong_sign: float
    exact_with_other_tiles: bool


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
    """Run all cases in a process of their own, where Triton interprets; return the reports by case."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"the interpreter ended with {done.returncode}; the last case is at fault:\n{done.stderr}"
        )
    return {name: Report(**fields) for name, fields in json.loads(done.stdout).items()}


def _report(case: Case) -> Report:
    from dbf_compile.kernels.sign_matmul.triton_kernel import sign_matmul_triton
    from dbf_compile.signs import pack_signs

    signs = torch.randint(0, 2, (case.N, case.K)) * 2 - 1
    words = _at_the_edge(pack_signs(signs))
    wrong_signs = signs.clone()
    wrong_signs[-1:, -1:] *= -1

    integers = _arranged(torch.randint(-8, 9, (*case.lead, case.K)), case)
    normal = _arranged(torch.randn(*case.lead, case.K), case)
    truth = integers.double() @ signs.double().T
    y = sign_matmul_triton(normal, words)
    return Report(
        poisoned=bool(integers.new_empty(3, dtype=torch.float32).isnan().all()),
        shape=list(y.shape),
        dtype=str(y.dtype).removeprefix("torch."),
        exact=torch.equal(sign_matmul_triton(integers, words).double(), truth),
        worst=_worst(y, normal, signs),
        worst_with_wrong_sign=_worst(y, normal, wrong_signs),
        exact_with_other_tiles=all(
            torch.equal(_with_tiles_for(rows, integers, words).double(), truth) for rows in (1, 64)
        ),
    )


def _with_tiles_for(rows: int, x: Tensor, words: Tensor) -> Tensor:
    """Launch with the tiles chosen for ``rows`` rows, whatever x has."""
    from dbf_compile.kernels.sign_matmul.triton_kernel import block_sizes, grid, sign_matmul_kernel

    M, N, K = math.prod(x.shape[:-1]), words.shape[0], x.shape[-1]
    y = _at_the_edge(torch.full((*x.shape[:-1], N), math.nan))
    blocks = block_sizes(rows, N, K)
    if y.numel():
        x = _at_the_edge(x)
        sign_matmul_kernel[grid(M, N, blocks)](x, words, y, M, N, K, **blocks)
    return y


def _worst(y: Tensor, x: Tensor, signs: Tensor) -> float:
    # A float32 sum of K terms, in any order, errs by at most (K - 1) u Σ|x| / (1 - (K - 1) u), u = 2⁻²⁴.
    bound = x.shape[-1] * 2.0**-24 * x.double().abs().sum(-1, keepdim=True)
    error = (y.double() - x.double() @ signs.double().T).abs()
    # NaN compares with nothing: turn it into an error that no bound covers.
    ratios = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf)
    return ratios.max().item() if ratios.numel() else 0.0


def _arranged(values: Tensor, case: Case) -> Tensor:
    """Cast to the case's dtype and lay out in memory as it asks."""
    x = values.to(getattr(torch, case.dtype))
    match case.layout:
        case "transposed":
            return _at_the_edge(x.mT).mT
        case "sliced":
            wide = _at_the_edge(x.new_full((*x.shape[:-1], case.K + 3), math.nan))
            wide[..., : case.K] = x
            return wide[..., : case.K]
        case "expanded":
            return _at_the_edge(x[:1]).expand(x.shape)
        case _:
            return _at_the_edge(x)


def _at_the_edge(values: Tensor) -> Tensor:
    """Copy to where the next byte cannot be read or written, and all before is NaN, or -1 for integers."""
    size = values.numel() * values.element_size()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, usable + mmap.PAGESIZE), dtype=torch.uint8)
    no_access = 0
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + usable), mmap.PAGESIZE, no_access)
    memory[:usable] = 0xFF
    return memory[usable - size : usable].view(values.dtype).view(values.shape).copy_(values)


def main() -> None:
    """Print the reports of all cases as JSON."""
    # Deterministic algorithms fill new memory with NaN: a lane the kernel forgets is seen.
    torch.use_deterministic_algorithms(True)
    reports = {}
    for case in CASES:
        print(case, file=sys.stderr, flush=True)
        torch.manual_seed(0)
        reports[str(case)] = asdict(_report(case))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
