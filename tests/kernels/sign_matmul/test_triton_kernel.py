"""The Triton kernel against the truth in float64, run by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import math

import pytest
from support.triton_interpreter_cases import CASES, Case, Report, run_all

pytest.importorskip("triton")

from dbf_compile.kernels.sign_matmul.triton_kernel import block_sizes, grid


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return run_all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_truth(case: Case, reports: dict[str, Report]) -> None:
    report = reports[str(case)]
    assert report.poisoned
    assert (report.shape, report.dtype) == ([*case.lead, case.N], "float32")
    assert report.exact
    assert report.worst <= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_tile_is_correct(case: Case, reports: dict[str, Report]) -> None:
    assert reports[str(case)].exact_with_other_tiles


@pytest.mark.parametrize("case", [case for case in CASES if math.prod(case.lead) * case.N * case.K], ids=str)
def test_the_tolerance_sees_one_wrong_sign(case: Case, reports: dict[str, Report]) -> None:
    assert reports[str(case)].worst_with_wrong_sign > 10


@pytest.mark.parametrize("M", [0, 1, 2, 3, 5, 4096])
@pytest.mark.parametrize("N", [1, 3, 37, 4096])
@pytest.mark.parametrize("K", [0, 1, 33, 97, 4096])
def test_tiles_cover_y_and_are_powers_of_two(M: int, N: int, K: int) -> None:
    blocks = block_sizes(M, N, K)
    assert all(size > 0 and size & (size - 1) == 0 for size in blocks.values())
    programs, *rest = grid(M, N, blocks)
    assert rest == [1, 1]
    assert programs * blocks["BLOCK_M"] * blocks["BLOCK_N"] >= M * N


def test_grid_takes_an_expression_for_the_rows() -> None:
    sympy = pytest.importorskip("sympy")
    rows = sympy.Symbol("rows", integer=True, positive=True)
    programs, _, _ = grid(
        rows, 37, block_sizes(64, 37, 100), cdiv=lambda a, b: sympy.ceiling(sympy.sympify(a) / b)
    )
    assert programs.subs(rows, 9) == 3 * 3
