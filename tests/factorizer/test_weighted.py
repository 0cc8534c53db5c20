"""The weighted weight: scaling can be undone, and keeps the objective."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.weights import correlations, covariance, gaussian, random_importance

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.factorizer.weighted import WeightedWeight, apply_metrics, squared_norm

LENGTHS = st.integers(1, 40)


@given(LENGTHS, LENGTHS, st.integers(-90, 90), st.integers(0, 1000))
def test_a_weighted_weight_gives_the_weight_back(out_features, in_features, exponent, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=draw) * 2.0**exponent
    importance = Importance(torch.rand(in_features, generator=draw), torch.rand(out_features, generator=draw))
    weighted = WeightedWeight.of(weight, importance)
    assert float(weighted.matrix.square().mean()) == pytest.approx(
        1, rel=1e-5
    )  # float32 sum of up to 1600 squares
    back = weighted.unit * (weighted.matrix / weighted.rows[:, None] / weighted.columns).double()
    # Six roundings of float32 on the way there and back.
    torch.testing.assert_close(back, weight.double(), rtol=1e-6, atol=0)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100), st.booleans(), st.booleans())
def test_the_objective_is_that_of_the_unscaled_weight(rows, columns, seed, whole_rows, whole_columns):
    weight, vectors = gaussian(rows, columns, seed), random_importance(rows, columns, seed)
    importance = Importance(
        covariance(columns, seed) if whole_columns else vectors.input_second_moment,
        covariance(rows, seed + 1) if whole_rows else vectors.output_grad_second_moment,
    )
    weighted = WeightedWeight.of(weight, importance)
    left, right = (
        (moment if moment.dim() == 2 else moment.diag()).double() / diagonal_of(moment).double().mean()
        for moment in (importance.output_grad_second_moment, importance.input_second_moment)
    )
    exact = float((left @ weight.double() @ right * weight.double()).sum())
    # The matrix, its weights and metrics are float32; the floor on weights adds 1e-8.
    scaled = weighted.unit**2 * squared_norm(weighted.matrix, weighted.row_metric, weighted.column_metric)
    assert scaled == pytest.approx(exact, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("left", [None, correlations(4, 1)], ids=["identity", "metric"])
@pytest.mark.parametrize("right", [None, correlations(6, 2)], ids=["identity", "metric"])
def test_an_absent_metric_is_the_identity(left, right):
    matrix = gaussian(4, 6)
    full = [torch.eye(size) if metric is None else metric for size, metric in ((4, left), (6, right))]
    torch.testing.assert_close(apply_metrics(matrix, left, right), full[0] @ matrix @ full[1])
    batch = torch.stack([matrix, 2 * matrix])
    torch.testing.assert_close(apply_metrics(batch, left, right)[1], 2 * apply_metrics(matrix, left, right))
    assert squared_norm(matrix, left, right) == pytest.approx(squared_norm(matrix, *full), rel=1e-5)


def test_transposing_swaps_the_sides():
    weighted = WeightedWeight.of(gaussian(4, 6), Importance(covariance(6), covariance(4)))
    swapped = weighted.transposed
    assert torch.equal(swapped.matrix, weighted.matrix.T)
    assert swapped.rows is weighted.columns and swapped.row_metric is weighted.column_metric
    assert swapped.transposed.rows is weighted.rows


def test_zeros_have_no_unit():
    weighted = WeightedWeight.of(torch.zeros(3, 5))
    assert weighted.unit == 0 and not weighted.matrix.any()


def test_an_importance_that_does_not_fit_is_refused():
    with pytest.raises(WeightError, match="length 3"):
        WeightedWeight.of(gaussian(3, 4), Importance(torch.ones(3)))
