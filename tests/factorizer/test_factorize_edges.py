"""The factorizer: batches, edge cases, the measure of its error, and what is refused."""

import math

import pytest
import torch
from support.weights import equal_factors, gaussian, random_importance, rms

from dbf_compile.errors import OptionError, WeightError
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, factorize_batch, weighted_error
from dbf_compile.factorizer.importance import Importance

QUICK = FactorizerConfig(iterations=20)


# Batches and progress


def test_a_batch_gives_what_single_weights_give():
    weights = [gaussian(48, 40, seed) for seed in range(4)]
    importances = [random_importance(48, 40, seed) for seed in range(3)] + [None]
    batch = factorize_batch(weights, 24, importances, QUICK)
    for weight, importance, factors in zip(weights, importances, batch, strict=True):
        alone = weighted_error(weight, factorize(weight, 24, importance, QUICK), importance)
        # Batched products may sum in another order, and tip a sign.
        assert weighted_error(weight, factors, importance) == pytest.approx(alone, rel=0.02)


def test_zeros_in_a_batch_stay_zeros_and_disturb_no_other():
    zeros, other = factorize_batch([torch.zeros(8, 6), gaussian(8, 6)], 4, None, QUICK)
    assert not zeros.dense().any() and weighted_error(gaussian(8, 6), other) < 1


@pytest.mark.parametrize(
    ("weights", "importances"),
    [
        ([torch.ones(2, 3), torch.ones(3, 2)], None),
        ([torch.ones(2, 3)] * 2, [Importance(torch.eye(3)), None]),
        ([], None),
    ],
    ids=["shapes", "forms", "none"],
)
def test_what_is_no_batch_is_refused(weights, importances):
    with pytest.raises(WeightError, match="batch"):
        factorize_batch(weights, 2, importances)


def test_progress_is_told_and_ends_at_one():
    fractions = []
    factorize(gaussian(12, 12), 6, None, QUICK, progress=fractions.append)
    assert len(fractions) == 20 and fractions == sorted(fractions) and fractions[-1] == 1


# Edge cases


def test_zeros_are_factored_exactly():
    factors = factorize(torch.zeros(5, 9), 4)
    assert not factors.dense().any()
    assert weighted_error(torch.zeros(5, 9), factors) == 0


@pytest.mark.parametrize("shape", [(33, 20), (20, 33)], ids=str)
def test_zero_rows_and_columns_stay_zero(shape):
    weight = gaussian(*shape)
    weight[3] = 0
    weight[:, [0, 7]] = 0
    dense = factorize(weight, 16, None, QUICK).dense()
    assert not dense[3].any() and not dense[:, [0, 7]].any()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("mid_features", [1, 3, 17])
def test_constants_are_factored_exactly(shape, mid_features):
    weight = torch.full(shape, -0.37)
    config = FactorizerConfig() if mid_features == 1 else QUICK
    # float16 scales are off by up to 5e-4 each; the squared error is far below.
    assert weighted_error(weight, factorize(weight, mid_features, None, config)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 40), (40, 1)], ids=str)
def test_vectors_are_factored_well(shape):
    weight = gaussian(*shape)
    # A vector is a sign times a magnitude: R = 1 is exact up to float16.
    assert weighted_error(weight, factorize(weight, 1)) < 1e-5


@pytest.mark.parametrize("size", [1e-10, 1e-5, 1e5, 1e10])
def test_magnitudes_that_fit_float16_scales(size):
    weight = gaussian(32, 32)
    # Only the rounding of the scales differs.
    assert weighted_error(weight.double() * size, factorize(weight * size, 16)) == pytest.approx(
        weighted_error(weight, factorize(weight, 16)), rel=0.02
    )


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e38])
def test_magnitudes_that_do_not_fit_are_refused(size):
    with pytest.raises(WeightError, match="range of float16"):
        factorize(gaussian(16, 16).clamp(-3, 3) * size, 8, None, QUICK)


def test_a_heavy_entry_does_not_spoil_the_rest():
    weight = gaussian(32, 32)
    weight[0, 0] = 1e6
    factors = factorize(weight, 32, None, QUICK)
    assert weighted_error(weight, factors) < 1e-3  # the entry is nearly all of the energy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_floating_dtypes_are_accepted(dtype):
    weight = gaussian(24, 24).to(dtype)
    assert equal_factors(factorize(weight, 12, None, QUICK), factorize(weight.float(), 12, None, QUICK))


def test_strides_do_not_matter():
    weight = gaussian(24, 40)
    assert equal_factors(
        factorize(weight.T.contiguous().T, 12, None, QUICK), factorize(weight, 12, None, QUICK)
    )


def test_unimportant_features_keep_sensible_scales():
    weight, importance = gaussian(32, 24), random_importance(32, 24)
    importance.input_second_moment[:4] = 0
    dense = factorize(weight, 24, importance, QUICK).dense()
    # A floored column has the size it would have anyway, neither lost nor blown up; 3 is far outside the
    # scatter.
    assert 1 / 3 < rms(dense[:, :4]) / rms(weight[:, :4]) < 3


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, float("nan")]]),
        torch.tensor([[1.0, float("inf")]]),
        torch.ones(4, 4, dtype=torch.int64),
        torch.ones(4, 4, dtype=torch.complex64),
        torch.ones(4),
        torch.ones(2, 2, 2),
        torch.ones(0, 4),
        [[1.0]],
    ],
    ids=["nan", "inf", "integer", "complex", "vector", "cube", "empty", "list"],
)
def test_what_is_no_finite_matrix_is_refused(weight):
    with pytest.raises(WeightError):
        factorize(weight, 2)


@pytest.mark.parametrize("mid_features", [0, -1, 1.5, True, None])
def test_mid_features_must_be_a_positive_whole_number(mid_features):
    with pytest.raises(WeightError, match="mid_features"):
        factorize(torch.ones(4, 4), mid_features)


@pytest.mark.parametrize(
    "importance", [Importance(torch.ones(5)), Importance(None, torch.ones(5))], ids=["input", "output"]
)
def test_an_importance_of_another_layer_is_refused(importance):
    with pytest.raises(WeightError, match="length 5"):
        factorize(torch.ones(4, 4), 2, importance)


@pytest.mark.parametrize(
    "setting",
    [
        {"iterations": 0},
        {"iterations": 2.0},
        {"sweeps": -1},
        {"sweeps": 1.5},
        {"seed": -1},
        {"seed": True},
    ],
    ids=str,
)
def test_settings_are_checked(setting):
    with pytest.raises(OptionError, match=next(iter(setting))):
        FactorizerConfig(**setting)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_very_few_iterations_are_allowed(iterations):
    weight = gaussian(16, 16)
    assert weighted_error(weight, factorize(weight, 8, None, FactorizerConfig(iterations=iterations))) < 1


# The measure


def test_weighted_error_is_the_squared_relative_error():
    weight, approximation = gaussian(8, 6), gaussian(8, 6, 1)
    expected = (
        (weight.double() - approximation.double()).square().sum() / weight.double().square().sum()
    ).item()
    assert weighted_error(weight, approximation) == pytest.approx(expected, rel=1e-12)  # float64 rounding


def test_weighted_error_weighs_rows_and_columns():
    weight = torch.ones(2, 2)
    importance = Importance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    # Missing the column with three quarters of the importance; weights are rounded to float32.
    missed = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert weighted_error(weight, missed, importance) == pytest.approx(0.75, rel=1e-6)


def test_weighted_error_of_zeros():
    weight = gaussian(4, 4)
    assert weighted_error(weight, torch.zeros(4, 4)) == 1
    assert weighted_error(torch.zeros(4, 4), torch.zeros(4, 4)) == 0
    assert math.isinf(weighted_error(torch.zeros(4, 4), weight))


def test_weighted_error_refuses_another_shape():
    with pytest.raises(WeightError, match="equal shapes"):
        weighted_error(torch.ones(4, 4), torch.ones(4, 1))
