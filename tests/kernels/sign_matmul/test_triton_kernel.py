"""The Triton kernels against the truth in float64, run by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.cuda.triton_cases import CASES, Case, run_all

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_all()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_truth(case: Case, results: dict[str, Any]) -> None:
    report = results["reports"][str(case)]
    assert report.poisoned
    assert (report.shape, report.dtype) == ([*case.lead, case.N], case.result)
    assert report.exact
    assert report.worst <= 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_tile_is_correct(case: Case, results: dict[str, Any]) -> None:
    assert results["reports"][str(case)].exact_with_other_tiles


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if math.prod(case.lead) * case.N * case.K and case.result == "float32"],
    ids=str,
)
def test_the_tolerance_sees_one_wrong_sign(case: Case, results: dict[str, Any]) -> None:
    # One sign in 97 is hardly more than 97 roundings to bfloat16 at their worst.
    rounded = math.prod(case.lead) > 16 and case.dtype != "float32" and case.scaled
    assert results["reports"][str(case)].worst_with_wrong_sign > (1 if rounded else 10)


@pytest.mark.slow
def test_infinite_and_undefined_activations_propagate(results: dict[str, Any]) -> None:
    assert results["not_finite"] == []
