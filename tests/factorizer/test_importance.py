"""Importance: what it accepts, how features are weighted, how layers are stacked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.errors import OptionError, WeightError
from dbf_compile.factorizer.importance import FLOOR, Importance
from dbf_compile.factorizer.weighted import WeightedWeight

MOMENTS = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40).map(torch.tensor)
LENGTHS = st.integers(1, 40)


@given(MOMENTS, st.integers(-10, 10))
def test_weights_ignore_a_constant_factor(moment, exponent):
    scaled = moment.double() * 2.0**exponent
    rows, columns = Importance(moment.double(), scaled).feature_weights(len(moment), len(moment))
    # A power of two moves no mantissa bit in float64.
    assert torch.equal(rows, columns)


@given(MOMENTS)
def test_weights_are_positive_with_mean_square_one(moment):
    _, columns = Importance(moment).feature_weights(3, len(moment))
    assert columns.dtype == torch.float32
    assert columns.min() >= FLOOR * (1 - 1e-6)  # float32 rounds the floor
    # float32 rounds each weight by up to 6e-8; the floor adds up to 2e-8.
    assert float(columns.double().square().mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("moment", [None, torch.zeros(5)])
def test_unknown_and_zero_moments_count_all_features_alike(moment):
    rows, columns = Importance(moment, moment).feature_weights(5, 5)
    assert torch.equal(rows, torch.ones(5)) and torch.equal(columns, torch.ones(5))


@pytest.mark.parametrize("faint", [1e-30, 1e-21, 0.0])
def test_a_whole_moment_of_a_feature_whose_square_underflows_couples_it_to_none(faint):
    activations = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    activations[:, 2] *= faint
    moment = activations.T @ activations
    assert moment[2, 2] < 1e-40 and (faint == 0.0 or moment[2, 0] != 0)
    metric = WeightedWeight.of(torch.ones(4, 6), Importance(moment)).column_metric
    assert metric.abs().max() <= 1
    rest = [0, 1, 3, 4, 5]
    alone = WeightedWeight.of(torch.ones(4, 5), Importance(moment[rest][:, rest])).column_metric
    torch.testing.assert_close(metric[rest][:, rest], alone, rtol=1e-6, atol=0)
    if moment[2, 2] == 0:
        assert torch.equal(metric[2], torch.eye(6)[2])


def test_one_zero_is_floored_not_dropped():
    _, columns = Importance(torch.tensor([0.0, 2.0])).feature_weights(1, 2)
    assert columns[0] == pytest.approx(FLOOR) and columns[1] == pytest.approx(2**0.5)


def test_moments_of_largest_float32_do_not_overflow():
    _, columns = Importance(torch.full((4,), torch.finfo(torch.float32).max)).feature_weights(1, 4)
    assert columns.tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    "moment",
    [
        torch.tensor([1.0, -1e-30]),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, float("inf")]),
        torch.ones(2, 3),
        torch.ones(2, 2, 2),
        torch.tensor([[1.0, 0.5], [-0.5, 1.0]]),
        torch.tensor(1.0),
        torch.ones(0),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        [1.0, 2.0],
    ],
    ids=[
        "negative",
        "nan",
        "inf",
        "oblong",
        "cube",
        "asymmetric",
        "scalar",
        "empty",
        "integer",
        "complex",
        "list",
    ],
)
@pytest.mark.parametrize("name", ["input_second_moment", "output_grad_second_moment"])
def test_bad_moments_are_refused_by_name(name, moment):
    with pytest.raises(WeightError, match=name):
        Importance(**{name: moment})


def test_moments_of_another_length_are_refused():
    with pytest.raises(WeightError, match=r"input_second_moment of length 3 .* 4"):
        Importance(torch.ones(3)).feature_weights(2, 4)
    with pytest.raises(WeightError, match=r"output_grad_second_moment of length 3 .* 2"):
        Importance(None, torch.ones(3)).feature_weights(2, 4)


def test_repr_shows_sizes_only():
    text = repr(Importance(torch.ones(4096)))
    assert text == "Importance(input_second_moment=[4096], output_grad_second_moment=None)"


@given(st.lists(LENGTHS, min_size=1, max_size=4), LENGTHS, st.data())
def test_stack_concatenates_outputs_and_averages_inputs(rows, features, data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    items = [Importance(torch.rand(features, generator=draw), torch.rand(n, generator=draw)) for n in rows]
    stacked = Importance.stack(items, rows)
    assert torch.equal(
        stacked.output_grad_second_moment, torch.cat([i.output_grad_second_moment for i in items])
    )
    # One rounding from float64 to float32.
    mean = sum(i.input_second_moment.double() for i in items) / len(items)
    torch.testing.assert_close(stacked.input_second_moment, mean.float(), rtol=1e-6, atol=0)


def test_stack_fills_a_missing_output_with_the_mean_of_the_known():
    stacked = Importance.stack(
        [Importance(None, torch.tensor([1.0, 3.0])), Importance(torch.ones(7))], [2, 3]
    )
    assert stacked.output_grad_second_moment.tolist() == [1, 3, 2, 2, 2]
    assert torch.equal(stacked.input_second_moment, torch.ones(7))


def test_stack_of_unknowns_is_unknown():
    stacked = Importance.stack([Importance(), Importance()], [2, 3])
    assert stacked.input_second_moment is None and stacked.output_grad_second_moment is None


@pytest.mark.parametrize(
    ("items", "rows"),
    [
        ([], []),
        ([Importance()], [1, 2]),
        ([Importance(torch.ones(2)), Importance(torch.ones(3))], [1, 1]),
        ([Importance(None, torch.ones(2))], [3]),
    ],
    ids=["none", "counts differ", "inputs differ", "rows differ"],
)
def test_stack_refuses_what_does_not_fit(items, rows):
    with pytest.raises(WeightError):
        Importance.stack(items, rows)


# Whole moments


def covariance(size, seed=0):
    root = torch.randn(size, size + 3, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size


@given(st.integers(1, 20), st.integers(0, 100))
def test_a_metric_has_ones_on_its_diagonal_and_undoes_the_weights(size, seed):
    moment = covariance(size, seed)
    importance = Importance(moment)
    _, metric = importance.metrics()
    assert torch.equal(metric.diagonal(), torch.ones(size))
    _, weights = importance.feature_weights(1, size)
    rebuilt = weights[:, None] * metric * weights * moment.diagonal().mean()
    torch.testing.assert_close(rebuilt, moment, rtol=1e-4, atol=1e-5)  # float32 roots and products


def test_a_feature_that_was_never_active_is_coupled_to_none():
    moment = covariance(4)
    moment[2] = moment[:, 2] = 0
    _, metric = Importance(moment).metrics()
    assert torch.equal(metric.diagonal(), torch.ones(4))
    assert not metric[2, [0, 1, 3]].any() and not metric[[0, 1, 3], 2].any()


def test_vectors_have_no_metric_and_matrices_have_their_diagonal():
    moment = covariance(5)
    assert Importance(torch.ones(5), None).metrics() == (None, None)
    plain = Importance(moment, moment).diagonal()
    assert torch.equal(plain.input_second_moment, moment.diagonal())
    assert torch.equal(
        Importance(moment).feature_weights(1, 5)[1], Importance(moment.diagonal()).feature_weights(1, 5)[1]
    )


@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_shrinking_keeps_the_mean_and_ends_uniform(kind):
    moment = covariance(6) if kind == "matrix" else covariance(6).diagonal()
    importance = Importance(moment, moment)
    assert torch.equal(importance.shrunk(0.0).input_second_moment, moment)
    half, whole = (
        importance.shrunk(0.5).output_grad_second_moment,
        importance.shrunk(1.0).output_grad_second_moment,
    )
    diagonal = (lambda m: m.diagonal()) if kind == "matrix" else (lambda m: m)
    torch.testing.assert_close(diagonal(half).mean(), diagonal(moment).mean())
    torch.testing.assert_close(diagonal(whole), diagonal(moment).mean().expand(6))
    if kind == "matrix":
        torch.testing.assert_close(half - half.diagonal().diag(), 0.5 * (moment - moment.diagonal().diag()))


@given(st.integers(2, 12), st.integers(0, 100), st.floats(0, 1))
def test_tempering_keeps_the_trace_and_flattens_the_spectrum(size, seed, power):
    moment = covariance(size, seed)
    tempered = Importance(moment).tempered(power).input_second_moment
    assert float(tempered.trace()) == pytest.approx(float(moment.trace()), rel=1e-4)
    before, after = (torch.linalg.eigvalsh(m.double()) for m in (moment, tempered))
    expected = before.clamp_min(0) ** power
    torch.testing.assert_close(after, expected * before.sum() / expected.sum(), rtol=1e-3, atol=1e-4)


def test_a_power_of_one_changes_nothing_and_of_zero_forgets_all():
    moment = covariance(5)
    torch.testing.assert_close(Importance(moment).tempered(1.0).input_second_moment, moment)
    torch.testing.assert_close(
        Importance(moment).tempered(0.0).input_second_moment, moment.trace() / 5 * torch.eye(5)
    )
    vector = torch.tensor([1.0, 4.0])
    torch.testing.assert_close(
        Importance(vector).tempered().input_second_moment, torch.tensor([5 / 3, 10 / 3])
    )


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_amounts_and_powers_are_checked(value):
    with pytest.raises(OptionError, match="amount"):
        Importance().shrunk(value)
    with pytest.raises(OptionError, match="power"):
        Importance().tempered(value)


def test_stacked_whole_moments_do_not_couple_the_layers():
    parts = [
        Importance(covariance(4), covariance(2, 1)),
        Importance(covariance(4, 2), None),
        Importance(None, torch.ones(2)),
    ]
    stacked = Importance.stack(parts, [2, 3, 2])
    assert stacked.input_second_moment.shape == (4, 4)
    moment = stacked.output_grad_second_moment
    torch.testing.assert_close(moment[:2, :2], covariance(2, 1))
    assert not moment[:2, 2:].any() and torch.equal(moment[5:, 5:], torch.eye(2))
    usual = torch.cat([covariance(2, 1).diagonal(), torch.ones(2)]).mean()
    torch.testing.assert_close(moment[2:5, 2:5], usual * torch.eye(3))
