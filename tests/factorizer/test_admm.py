"""ADMM: the schedule, what an update solves and keeps, and what a whole metric changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.weights import correlations, gaussian, random_importance

from dbf_compile.errors import WeightError
from dbf_compile.factorizer import admm
from dbf_compile.factorizer.admm import (
    Buffers,
    Coefficients,
    Factor,
    Problem,
    Subproblem,
    _gram,
    _solve,
    _spectrum,
    _step,
    run_admm,
)
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import TINY
from dbf_compile.factorizer.weighted import WeightedWeight

SEEDS = st.integers(0, 1000)
STEADY = Coefficients(ridge=0.1, rho=0.3, relaxation=1.0, leak=1.0, averaging=0.0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 600])
def test_the_schedule_tightens_from_first_to_last(iterations, whole):
    steps = list(admm.schedule(iterations, whole))
    assert len(steps) == iterations
    assert steps[0].rho == pytest.approx(0.12 if whole else 0.16)
    for name in ("rho", "relaxation", "leak", "averaging"):
        values = [getattr(step, name) for step in steps]
        assert values == sorted(values)
    ridges = [step.ridge for step in steps]
    assert ridges == sorted(ridges, reverse=True) and ridges[-1] > 0
    if iterations > 1:
        assert steps[-1].rho == pytest.approx(0.95) and ridges[-1] == pytest.approx(0.004)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), SEEDS, st.booleans(), st.booleans())
def test_an_update_solves_its_normal_equations(mid, rows, columns, seed, coupled_rows, coupled_columns):
    left = correlations(rows, seed + 1)[None] if coupled_rows else None
    right = correlations(columns, seed + 2)[None] if coupled_columns else None
    basis, right_side = gaussian(mid, rows, seed)[None], gaussian(mid, columns, seed + 3)[None]
    subproblem = Subproblem(gaussian(columns, rows)[None], left, _spectrum(right))
    solution = _solve(subproblem, basis, right_side, STEADY)
    normal = (basis if left is None else basis @ left) @ basis.mT
    shift = STEADY.rho + STEADY.ridge * float(normal.diagonal(dim1=-2, dim2=-1).mean())
    back = normal @ solution @ (torch.eye(columns)[None] if right is None else right) + shift * solution
    # float32; the shift bounds the condition number by about 10.
    torch.testing.assert_close(back, right_side, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("narrow", [False, True])
@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), SEEDS)
def test_a_step_adds_to_a_share_of_the_anchor_what_solves_the_normal_equations(
    narrow, batch, mid, rows, columns, seed
):
    generator = torch.Generator().manual_seed(seed)
    target, basis, start = (
        torch.randn(batch, *shape, generator=generator)
        for shape in ((rows, columns), (mid, rows), (mid, columns))
    )
    dtype = torch.bfloat16 if narrow else torch.float32
    basis = torch.nn.functional.normalize(basis, dim=-1).to(dtype)
    factor = Factor(start, None, dtype)
    anchor = factor.anchor(STEADY.leak).mT.clone()  # its buffer is used again
    subproblem = Subproblem(target.mT.contiguous(), None, None)
    for _ in range(2):  # nothing is left of the first in the buffers
        share, step = _step(factor, subproblem, basis, STEADY)
    share = share[:, None, None]
    exact = basis.double()
    normal = exact @ exact.mT
    shift = STEADY.rho + STEADY.ridge * normal.diagonal(dim1=-2, dim2=-1).mean(-1)
    normal.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    solution = torch.linalg.solve(normal, exact @ target.double() + STEADY.rho * anchor.double())
    # The terms of the sums, without their signs: where they cancel, their errors do not.
    rest = target.abs() + share * exact.mT.abs() @ anchor.double().abs()
    terms = (exact.abs() @ rest / shift[:, None, None]).norm() + (share * anchor).norm()
    # bfloat16 has 8 bits, and up to four numbers are rounded in every term.
    assert (share * anchor + step - solution).norm() < (2**-7 if narrow else 2**-22) * terms


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (5, 1), (7, 11), (9, 4)])
def test_panels_of_a_symmetric_product_fill_its_lower_triangle(monkeypatch, rows, columns):
    monkeypatch.setattr(admm, "_PANEL", 4)
    factor = gaussian(rows, columns)[None]
    torch.testing.assert_close(_gram(factor, Buffers()).tril(), (factor @ factor.mT).tril())
    both = _gram(factor.expand(2, -1, -1), Buffers())
    torch.testing.assert_close(both[1].tril(), (factor @ factor.mT)[0].tril())


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), SEEDS, st.booleans())
def test_an_update_leaves_signs_times_a_rank_one_magnitude(mid, rows, columns, seed, fixed):
    subproblem = Subproblem(gaussian(columns, rows, seed)[None], None, None)
    direction = torch.nn.functional.normalize(gaussian(1, columns, seed + 1).abs() + 0.1)
    factor = Factor(gaussian(mid, columns, seed + 2)[None], direction if fixed else None)
    for _ in range(3):
        factor.update(subproblem, gaussian(mid, rows, seed + 3)[None], STEADY)
        magnitude = factor.rows[..., None] * factor.columns[..., None, :]
        # With averaging 0 the basis is the projection, its rows scaled to norm 1.
        projected = factor.basis * (factor.rows[..., None] + TINY)
        torch.testing.assert_close(projected.abs(), magnitude.expand_as(projected))
        nonzero = (factor.point != 0) & (magnitude != 0)
        assert torch.equal(factor.point.sign()[nonzero], factor.basis.sign()[nonzero])
    assert float(factor.columns.norm()) == pytest.approx(1, rel=1e-5)  # float32 norm
    assert not fixed or torch.equal(factor.columns, direction)


def test_numbers_that_are_not_finite_are_refused(monkeypatch):
    problem = Problem.of([WeightedWeight.of(gaussian(6, 8))])
    generator = torch.Generator().manual_seed(0)
    # What a failed Cholesky factorization leaves behind.
    spoilt = STEADY._replace(rho=float("nan"))
    monkeypatch.setattr(admm, "schedule", lambda iterations, whole: [spoilt] * iterations)
    with pytest.raises(WeightError, match="TF32"):
        run_admm(problem.subproblems(problem.matrix), 4, (None, None), 1, generator, 3, None)


def test_moments_without_coupling_give_what_their_diagonals_give(monkeypatch):
    schedule = admm.schedule
    monkeypatch.setattr(admm, "schedule", lambda iterations, whole: schedule(iterations, True))
    weight, plain = gaussian(48, 64), random_importance(48, 64)
    whole = Importance(plain.input_second_moment.diag(), plain.output_grad_second_moment.diag())
    config = FactorizerConfig(iterations=60, sweeps=0)
    errors = [weighted_error(weight, factorize(weight, 40, item, config), plain) for item in (whole, plain)]
    # The same equations, solved by eigenvectors in place of Cholesky factors; signs near zero may tip.
    assert errors[0] == pytest.approx(errors[1], rel=0.03)
