"""A learning weight: what it stands for, its gradients, and what signs follow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models.tiny import error_of, randn
from support.strategies import random_factors_like, seeds

from dbf_compile.factorizer.projection import signs_of
from dbf_compile.finetuning.weights import LearningWeight, Signs


def learning(rows=(37,), columns=50, mid=23):
    stacked = random_factors_like(randn(sum(rows), columns), mid)
    return LearningWeight(dict(zip("abc", stacked.split(rows), strict=False)), torch.float32), stacked


@pytest.mark.parametrize("rows", [(37,), (5, 1, 16)])
def test_it_stands_for_its_factors_and_gives_them_back(rows):
    weight, stacked = learning(rows)
    assert error_of(weight.dense(), stacked.dense()) < 1e-5
    factors = weight.factors()
    assert [one.out_features for one in factors.values()] == list(rows)
    assert error_of(torch.cat([one.dense() for one in factors.values()]), stacked.dense()) < 2e-3
    assert len({id(one.signs_in) for one in factors.values()}) == 1


def dense_of(outer, inner, scales):
    return scales["out"][:, None] * ((outer * scales["mid"]) @ (inner * scales["in"]))


def test_a_step_follows_the_gradients_of_autograd(monkeypatch):
    weight, _ = learning()
    gradient = randn(37, 50, seed=1)
    leaves = {name: tensor.float().clone().requires_grad_() for name, tensor in weight.learned().items()}
    scales = {name: leaves[name] for name in ("out", "mid", "in")}
    (dense_of(leaves["outer"], leaves["inner"], scales) * gradient).sum().backward()
    passed = {}
    monkeypatch.setattr(weight._adam, "step", lambda gradients, rate: passed.update(gradients))
    for name in ("outer", "inner"):
        flip = lambda value, share, name=name: passed.update({name: value.clone()}) or 1  # noqa: E731
        monkeypatch.setattr(getattr(weight, f"_{name}"), "flip", flip)
    assert weight.step(gradient, 0.1) == 0 and passed.keys() == scales.keys()
    weight._memory.zero_()
    assert weight.step(gradient, 0.1, 0.75, 0.01) == 2 and passed.keys() == leaves.keys()
    for name, actual in passed.items():
        expected = leaves[name].grad * (1 if name in scales else 0.25)  # three quarters are those of before
        assert error_of(actual, expected) < 1e-5


@given(seeds, st.integers(1, 12), st.integers(1, 40), st.floats(0, 0.5))
def test_the_signs_flip_whose_flip_gains_most_in_units_of_their_row_and_column(seed, rows, columns, share):
    signs = Signs(signs_of(randn(rows, columns, seed=seed)).to(torch.int8))
    sizes = randn(rows, 1, seed=seed + 1).exp() * randn(1, columns, seed=seed + 2).exp()
    gradient = randn(rows, columns, seed=seed + 3) * sizes
    before, gain = signs.values.clone(), gradient * signs.values
    score = gain / (gain.square().mean(1, keepdim=True) * gain.square().mean(0)).sqrt()
    flips = signs.flip(gradient.clone(), share)
    flipped = before != signs.values
    assert set(signs.values.unique().tolist()) <= {-1, 1}
    assert flips == int(flipped.sum()) <= share * before.numel()
    assert flips == min(int(share * before.numel()), int((score > 0).sum()))
    if flips:
        assert float(gain[flipped].min()) > 0
        assert float(score[flipped].min()) >= float(score[~flipped].max()) * (1 - 1e-4)


def test_parts_of_a_flip_add_up():
    signs = Signs(torch.ones(10, 10, dtype=torch.int8))
    flips = [signs.flip(randn(10, 10, seed=step), 0.0025) for step in range(8)]
    assert flips == [0, 0, 0, 1, 0, 0, 0, 1]


def test_scales_alone_need_no_memory():
    stacked = random_factors_like(randn(37, 50), 23)
    weight = LearningWeight({"a": stacked}, torch.float32, signs=False)
    assert weight.step(randn(37, 50, seed=1), 0.1, 0.5, 0.5) == 0 and "memory" not in weight.moments()
    assert weight.moments().keys() < LearningWeight({"a": stacked}, torch.float32).moments().keys()


def test_products_in_bfloat16_are_near():
    stacked = random_factors_like(randn(37, 50), 23)
    one, other = (LearningWeight({"a": stacked}, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert one.dense().dtype == torch.bfloat16 and error_of(one.dense(), other.dense()) < 2e-2
    for weight in (one, other):
        weight.step(randn(37, 50, seed=1), 0.01)
    assert one.moments()["memory"].dtype == torch.bfloat16
    for state, expected in zip(
        (one.learned(), one.moments()), (other.learned(), other.moments()), strict=True
    ):
        for name in ("out", "mid", "in") if "out" in state else ("memory",):
            assert error_of(state[name], expected[name]) < 2e-2, name


def test_a_gradient_of_zeros_changes_nothing():
    weight, _ = learning()
    weight.step(randn(37, 50, seed=1), 0.1, 0.5, 0.1)
    before = {name: tensor.clone() for name, tensor in {**weight.learned(), **weight.moments()}.items()}
    assert weight.step(torch.zeros(37, 50), 0.1, 0.5, 0.1) == 0
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in {**weight.learned(), **weight.moments()}.items()
    )


@pytest.mark.parametrize("size", [0, 1e-37, 1e-30, 1e-22, 1e-18])
def test_rows_whose_gradient_is_next_to_nothing_stay(size):
    weight, _ = learning()
    gradient = randn(37, 50, seed=1)
    gradient[3] *= size
    before = weight.learned()["outer"].clone()
    assert weight.step(gradient, 0.1, 0.0, 0.3)
    after = weight.learned()["outer"]
    assert torch.equal(after[3], before[3]) and not torch.equal(after[2], before[2])
    assert all(bool(tensor.isfinite().all()) for tensor in weight.learned().values())


def test_signs_follow_what_stays_of_gradients_more_than_noise():
    goal, _ = learning()
    goal._outer.values[:, ::2] *= -1  # another weight of the same scales
    left = {}
    for kept in (0.0, 0.95):
        weight, _ = learning()
        first = float((goal.dense() - weight.dense()).square().sum())
        for step in range(300):
            gradient = weight.dense() - goal.dense()
            gradient += 3 * gradient.square().mean().sqrt() * randn(37, 50, seed=step)
            weight.step(gradient, 0.0, kept, 0.008)
        left[kept] = float((goal.dense() - weight.dense()).square().sum()) / first
    assert left[0.95] < 0.6 < 0.7 < left[0.0]
