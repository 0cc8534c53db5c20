"""Budgets: the curves, and what an allocation promises."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbf_compile.compression.budgets import ErrorCurve, allocate_bits
from dbf_compile.errors import OptionError
from dbf_compile.factors import mid_features_for


def curve(out_features=256, in_features=128, weight=1.0, rate=1.4):
    """A curve as factorizations have it: the error falls with e^(-rate · bits)."""
    share = (out_features + in_features) / (
        out_features * in_features
    )  # bits of a middle feature, scales left out
    sizes = [round(bits / share) for bits in (0.75, 1.5, 3.0)]
    return ErrorCurve(
        in_features, out_features, tuple((size, math.exp(-rate * share * size)) for size in sizes), weight
    )


@st.composite
def curves(draw, counts=(8, 16)):
    sizes = st.sampled_from([256, 344, 384, 512])
    count = draw(st.integers(*counts))
    return {
        f"layers.{index}.linear": curve(
            draw(sizes), draw(sizes), 10 ** draw(st.floats(-2, 2)), draw(st.floats(0.5, 3.0))
        )
        for index in range(count)
    }


# Curves


@given(curves())
def test_a_curve_passes_through_its_points_and_falls(weights):
    for error_curve in weights.values():
        for size, error in error_curve.points:
            expected = error_curve.weight * error
            assert error_curve.loss(size) == pytest.approx(expected, rel=1e-12)  # float64 exp and log
        losses = [error_curve.loss(size) for size in range(0, 400, 7)]
        assert losses[0] == error_curve.weight and losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "points", [(), ((4, 0.5), (4, 0.4)), ((8, 0.5), (4, 0.4)), ((4, 0.0),), ((0, 1.0),)], ids=str
)
def test_bad_points_are_refused(points):
    with pytest.raises(OptionError, match="rising order"):
        ErrorCurve(8, 8, points)


# Allocations


@settings(max_examples=30)
@given(curves(), st.floats(0.8, 3.5), st.sampled_from([1, 32, 64]))
def test_the_budget_is_met_to_a_thousandth_and_never_exceeded(weights, bits, multiple):
    allocation = allocate_bits(weights, bits, multiple=multiple)
    assert 0.999 * bits <= allocation.true_bits_per_weight <= bits
    assert allocation.stored == sum(
        weights[name].bits(size) for name, size in allocation.mid_features.items()
    )


# With steps of 1 there are as many steps as middle features: few weights.
@settings(max_examples=6)
@given(curves(counts=(3, 5)), st.floats(1.0, 3.0))
def test_it_is_never_predicted_worse_than_equal_bits_when_free(weights, bits):
    # With multiples of 1 equal bits are one of the choices, up to the bits that whole words leave unused.
    allocation = allocate_bits(weights, bits, multiple=1, floor=0, ceiling=16)
    assert allocation.predicted <= 1 + 2e-2


@settings(max_examples=40)
@given(curves(), st.floats(1.0, 3.0))
def test_floors_and_ceilings_hold(weights, bits):
    allocation = allocate_bits(weights, bits, floor=0.8 * bits, ceiling=1.5 * bits)
    for row in allocation.rows():
        error_curve = weights[row["name"]]
        low = mid_features_for(0.8 * bits, error_curve.in_features, error_curve.out_features)
        high = mid_features_for(1.5 * bits, error_curve.in_features, error_curve.out_features)
        assert min(low, high // 32 * 32) <= row["mid_features"] <= high


def test_the_greedy_choice_is_the_best_of_all_choices():
    weights = {"a": curve(512, 512, 3.0, 1.0), "b": curve(512, 512, 1.0, 1.5), "c": curve(512, 768, 0.3, 2.0)}
    grid = range(32, 1025, 32)
    losses = [{size: error_curve.loss(size) for size in grid} for error_curve in weights.values()]
    costs = [{size: error_curve.bits(size) for size in grid} for error_curve in weights.values()]
    for bits in (1.5, 2.0):
        budget = bits * sum(error_curve.size for error_curve in weights.values())
        allocation = allocate_bits(weights, bits, floor=0.1, ceiling=8)
        mine = sum(weights[name].loss(size) for name, size in allocation.mid_features.items())
        best = min(
            losses[0][a] + losses[1][b] + losses[2][c]
            for a, b, c in itertools.product(grid, repeat=3)
            if costs[0][a] + costs[1][b] + costs[2][c] <= budget
        )
        # Greedy on hulls is optimal up to the last step, which may be off by one multiple of one weight.
        assert mine <= best * 1.05


def test_weights_that_matter_more_get_more():
    weights = {"little": curve(weight=1.0), "much": curve(weight=50.0)}
    allocation = allocate_bits(weights, 2.0)
    assert allocation.mid_features["much"] > allocation.mid_features["little"]
    assert allocation.predicted < 1
    assert "bits per weight of 2.0" in str(allocation) and "much" in str(allocation)


def test_equal_weights_share_equally_in_multiples():
    weights = {f"layer{index}": curve() for index in range(8)}
    sizes = sorted(allocate_bits(weights, 2.0).mid_features.values())
    assert sizes[-1] - sizes[0] <= 64


def test_most_sizes_are_multiples():
    weights = {f"layer{index}": curve(512, 512, 1.0 + index) for index in range(40)}
    allocation = allocate_bits(weights, 2.0)
    # The others give back what one multiple cost too much, each a little.
    assert sum(size % 32 != 0 for size in allocation.mid_features.values()) <= 10


def test_overridden_weights_have_their_bits_and_the_others_make_up_for_them():
    weights = {"a": curve(), "b": curve(), "c": curve()}
    allocation = allocate_bits(weights, 2.0, fixed={"a": 3.0})
    assert allocation.mid_features["a"] == mid_features_for(3.0, 128, 256)
    assert allocation.reasons["a"] == "override"
    assert 1.9 <= allocation.true_bits_per_weight <= 2.0  # of three small weights
    assert allocation.mid_features["b"] < allocation.mid_features["a"]


def test_a_multiple_too_coarse_for_a_floor_is_no_reason_to_fail():
    # 128 x 128 at 1 bit holds 32 middle features: rounded up to 64, the floors alone would exceed the budget.
    weights = {f"layer{index}": curve(128, 128) for index in range(8)}
    assert allocate_bits(weights, 1.0, multiple=64).true_bits_per_weight <= 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": 0.0}, "0.05 to 16"),
        ({"floor": 3.0}, "floor ≤ bits_per_weight"),
        ({"ceiling": 1.0}, "floor ≤ bits_per_weight"),
        ({"multiple": 0}, "multiple=0"),
        ({"fixed": {"b": 1.0}}, "bits for"),
        ({"fixed": {"a": 8.0}}, "exceed"),
        ({"fixed": {"a": 1.0}}, "unused"),
    ],
    ids=str,
)
def test_bad_budgets_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        allocate_bits({"a": curve()}, **{"bits_per_weight": 2.0, **options})
