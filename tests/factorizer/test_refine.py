"""Refinement: every step is exact in its block, and the objective never rises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.factorizer.refine import Product, flip_signs, refine, refit_scales, squared_error

SIZES = st.integers(1, 24)
SEEDS = st.integers(0, 1000)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signs(*shape, seed=0):
    return torch.where(gaussian(*shape, seed=seed) < 0, -1.0, 1.0)


def product(rows, mid, columns, seed):
    return Product(
        signs(rows, mid, seed=seed),
        signs(mid, columns, seed=seed + 1),
        gaussian(rows, seed=seed + 2).abs() + 0.1,
        gaussian(mid, seed=seed + 3).abs() + 0.1,
        gaussian(columns, seed=seed + 4).abs() + 0.1,
    )


def metric(size, seed):
    """A correlation matrix."""
    root = gaussian(size, size + 2, seed=seed)
    root = root / root.norm(dim=1, keepdim=True)
    return root @ root.T


def problem(rows, mid, columns, seed, coupled_rows, coupled_columns):
    return (
        gaussian(rows, columns, seed=seed + 9),
        product(rows, mid, columns, seed),
        metric(rows, seed + 5) if coupled_rows else None,
        metric(columns, seed + 6) if coupled_columns else None,
    )


@given(SIZES, SIZES, SIZES, SEEDS, st.booleans(), st.booleans(), st.integers(0, 3))
def test_the_objective_never_rises(rows, mid, columns, seed, coupled_rows, coupled_columns, sweeps):
    target, start, left, right = problem(rows, mid, columns, seed, coupled_rows, coupled_columns)
    errors = [
        squared_error(target, refine(target, start, left, right, sweeps=count), left, right)
        for count in range(sweeps + 1)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == squared_error(target, start, left, right)


@given(SIZES, SIZES, SIZES, SEEDS, st.booleans(), st.booleans())
def test_refitted_scales_are_stationary_one_by_one(rows, mid, columns, seed, coupled_rows, coupled_columns):
    target, start, left, right = problem(rows, mid, columns, seed, coupled_rows, coupled_columns)
    refitted = refit_scales(target, start, left, right)
    # The last fit, of scale_in, must be the minimum over it: in float64 no step along any scale gains.
    scale = refitted.scale_in.double().requires_grad_()
    outer = (
        refitted.scale_out[:, None] * refitted.signs_out * refitted.scale_mid
    ).double() @ refitted.signs_in.double()
    missed = target.double() - outer * scale
    weighted = missed if left is None else left.double() @ missed
    weighted = weighted if right is None else weighted @ right.double()
    (gradient,) = torch.autograd.grad((missed * weighted).sum(), scale)
    curvature = outer.square().sum(0) + 1
    # Solved in float32, with a millionth added to the diagonal; parallel columns amplify both.
    assert float((gradient.abs() / curvature).max()) < 2e-2 * (1 + float(target.abs().max()))


@given(SIZES, SIZES, SIZES, SEEDS, st.booleans())
def test_after_the_descent_no_single_flip_gains(rows, mid, columns, seed, coupled):
    target, start, _, right = problem(rows, mid, columns, seed, False, coupled)
    descended = flip_signs(target, start, right)
    error = squared_error(target, descended, None, right)
    assert error <= squared_error(target, start, None, right) * (1 + 1e-5)  # float32 sums
    for row in range(min(rows, 3)):
        for component in range(min(mid, 5)):
            flipped = descended.signs_out.clone()
            flipped[row, component] *= -1
            other = squared_error(target, descended._replace(signs_out=flipped), None, right)
            assert other >= error * (1 - 1e-4) - 1e-6


def test_a_spoilt_sign_is_put_right():
    exact = product(12, 6, 40, 0)
    target = exact.dense()
    spoilt = exact.signs_out.clone()
    spoilt[3, 2] *= -1
    assert torch.equal(flip_signs(target, exact._replace(signs_out=spoilt)).signs_out, exact.signs_out)


def test_spoilt_scales_are_put_right():
    exact = product(30, 6, 40, 0)
    target = exact.dense()
    spoilt = exact._replace(scale_mid=exact.scale_mid * torch.linspace(0.5, 2, 6))
    assert squared_error(target, refit_scales(target, spoilt)) < 1e-6 * float(target.square().sum())


def test_signs_of_coupled_rows_are_left_alone():
    target, start, left, _ = problem(12, 6, 20, 0, True, False)
    refined = refine(target, start, left, None)
    assert torch.equal(refined.signs_out, start.signs_out)
    assert not torch.equal(refined.signs_in, start.signs_in)


@pytest.mark.parametrize("which", ["scale_out", "scale_mid", "scale_in"])
def test_zeros_give_no_nan(which):
    target, start = gaussian(6, 8), product(6, 3, 8, 0)
    start = start._replace(**{which: torch.zeros_like(getattr(start, which))})
    assert all(bool(torch.isfinite(part).all()) for part in refine(target, start))
    assert all(bool(torch.isfinite(part).all()) for part in refine(torch.zeros(6, 8), start))


@given(SIZES, SIZES, SIZES, SEEDS)
def test_signs_take_over_what_is_negative(rows, mid, columns, seed):
    start = product(rows, mid, columns, seed)
    mixed = start._replace(
        scale_out=start.scale_out * signs(rows, seed=seed + 7),
        scale_mid=start.scale_mid * signs(mid, seed=seed + 8),
        scale_in=start.scale_in * signs(columns, seed=seed + 9),
    )
    nonnegative = mixed.nonnegative
    assert all(bool((scale >= 0).all()) for scale in nonnegative[2:])
    assert torch.equal(nonnegative.dense(), mixed.dense())  # the same products, sign by sign
