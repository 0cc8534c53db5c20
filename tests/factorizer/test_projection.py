"""Sign-value projection and the one-bit baseline."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.factorize import weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import half_scales, onebit, rank_one, signs_of

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 1000)


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def project(matrix):
    """The nearest matrix of signs with a rank-one magnitude, as ADMM and OneBit take it."""
    rows, columns = rank_one(matrix.abs())
    return signs_of(matrix) * torch.outer(rows, columns), rows, columns


def signed_rank_one(rows, cols, seed):
    magnitude = torch.outer(
        gaussian(rows, 1, seed)[:, 0].abs() + 0.1, gaussian(cols, 1, seed + 1)[:, 0].abs() + 0.1
    )
    return signs_of(gaussian(rows, cols, seed + 2)) * magnitude


def test_both_zeros_have_sign_plus_one():
    matrix = torch.tensor([[0.0, -0.0, -1.0], [1.0, 1.0, 1.0]])
    assert signs_of(matrix)[0].tolist() == [1, 1, -1]
    assert signs_of(project(matrix)[0])[0].tolist() == [1, 1, -1]
    assert project(matrix)[0][0, 1] > 0


@given(SIZES, SIZES, SEEDS)
def test_projection_keeps_signs_and_has_a_rank_one_magnitude(rows, cols, seed):
    matrix = gaussian(rows, cols, seed)
    projected, left, right = project(matrix)
    assert torch.equal(signs_of(projected), signs_of(matrix))
    assert torch.equal(projected.abs(), torch.outer(left, right))
    assert (left >= 0).all() and (right >= 0).all()
    assert float(right.norm()) == pytest.approx(1, rel=1e-5)  # float32 norm


@given(SIZES, SIZES, SEEDS)
def test_projection_leaves_its_own_image_alone(rows, cols, seed):
    matrix = signed_rank_one(rows, cols, seed)
    # A rank-one magnitude is found in one power iteration; the rest is float32 rounding of norms and
    # products.
    torch.testing.assert_close(project(matrix)[0], matrix, rtol=1e-5, atol=0)


@given(SIZES, SIZES, SEEDS)
def test_projection_never_moves_further_than_zero_would(rows, cols, seed):
    matrix = gaussian(rows, cols, seed)
    # 1e-5: float32 rounding; σ = uᵀ|M|v makes the step a projection, however far the power iteration has
    # come.
    assert (matrix - project(matrix)[0]).norm() <= matrix.norm() * (1 + 1e-5)


@given(st.integers(2, 40), st.integers(2, 40), SEEDS)
def test_rank_one_is_the_top_singular_triple(rows, cols, seed):
    magnitude = gaussian(rows, cols, seed).abs() + 1
    left, right = rank_one(magnitude, power_iterations=50)
    u, s, vh = torch.linalg.svd(magnitude)
    # Adding 1 opens the spectral gap, so that 50 iterations end at float32 rounding.
    torch.testing.assert_close(
        torch.outer(left, right), s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-4, atol=1e-5
    )


def test_projection_of_zeros_is_zeros():
    assert not project(torch.zeros(3, 5))[0].any()


@given(st.integers(-30, 30), SEEDS)
def test_half_scales_keep_the_product_and_share_one_size(exponent, seed):
    vectors = [gaussian(length, 1, seed + length)[:, 0] for length in (5, 7, 11)]
    halves = half_scales(2.0**exponent, *vectors)
    sizes = [float(half.double().square().mean().sqrt()) for half in halves]
    # float16 rounds by 5e-4 of an entry.
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-3)
    got = torch.einsum("a,b,c->abc", *(half.double() for half in halves))
    want = 2.0**exponent * torch.einsum("a,b,c->abc", *(vector.double() for vector in vectors))
    assert float((got - want).norm() / want.norm()) < 2e-3  # three roundings of 5e-4


@pytest.mark.parametrize("unit", [1e30, 1e-30, float("inf")])
def test_scales_outside_float16_are_refused(unit):
    with pytest.raises(WeightError, match="range of float16"):
        half_scales(unit, torch.ones(3), torch.ones(4), torch.ones(5))


@given(SIZES, SIZES, SEEDS)
def test_onebit_is_exact_on_its_own_form(rows, cols, seed):
    weight = signed_rank_one(rows, cols, seed)
    # Two scales rounded to float16: squared error of about (5e-4)².
    assert weighted_error(weight, onebit(weight)) < 1e-6


def test_onebit_of_a_gaussian_loses_what_one_sign_must():
    # 1 − 2/π of the energy is lost by sign times the best constant; 514 fitted scales save under 2 %.
    error = weighted_error(weight := gaussian(256, 256), onebit(weight))
    assert error == pytest.approx(1 - 2 / torch.pi, rel=0.02)


def test_onebit_uses_the_importance():
    weight = gaussian(96, 64)
    importance = Importance(gaussian(64, 1, 1)[:, 0] ** 4, gaussian(96, 1, 2)[:, 0] ** 4)
    assert weighted_error(weight, onebit(weight, importance), importance) < weighted_error(
        weight, onebit(weight), importance
    )


def test_onebit_counts_words_and_scales():
    factors = onebit(gaussian(5, 33))
    assert factors.bits() == 32 * 5 * 2 + 16 * (5 + 33)
    assert factors.bits_per_weight() == factors.bits() / (5 * 33)
    assert factors.dense(torch.float64).dtype == torch.float64


def test_onebit_of_zeros_is_zeros():
    assert not onebit(torch.zeros(4, 6)).dense().any()


def test_onebit_refuses_what_the_factorizer_refuses():
    with pytest.raises(WeightError):
        onebit(torch.ones(3, 3, dtype=torch.int32))
