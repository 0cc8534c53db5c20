"""A learning weight: what it stands for, its gradients, and what signs follow."""

import pytest
import torch
from support.models.tiny import error_of, randn
from support.strategies import random_factors_like

from dbf_compile.finetuning.weights import LearningWeight


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


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_step_follows_the_gradients_of_autograd(monkeypatch, rate):
    weight, _ = learning()
    gradient = randn(37, 50, seed=1)
    leaves = {name: tensor.float().clone().requires_grad_() for name, tensor in weight.learned().items()}
    scales = {name: leaves[name] for name in ("out", "mid", "in")}
    (dense_of(leaves["outer"], leaves["inner"], scales) * gradient).sum().backward()
    passed = {}
    monkeypatch.setattr(weight._adam, "step", lambda gradients, rate: passed.update(gradients))
    for name in ("outer", "inner"):
        latents = getattr(weight, f"_{name}")
        monkeypatch.setattr(
            latents, "step", lambda value, rate, name=name: passed.update({name: value.clone()}) or 1
        )
    assert weight.step(gradient, rate, 0.1) == (2 if rate else 0)
    assert passed.keys() == (leaves.keys() if rate else scales.keys())
    for name, actual in passed.items():
        assert error_of(actual, leaves[name].grad) < 1e-5


def test_products_in_bfloat16_are_near():
    stacked = random_factors_like(randn(37, 50), 23)
    one, other = (LearningWeight({"a": stacked}, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert one.dense().dtype == torch.bfloat16 and error_of(one.dense(), other.dense()) < 2e-2
    for weight in (one, other):
        weight.step(randn(37, 50, seed=1), 0.3, 0.01)
    for name, tensor in one.learned().items():
        assert error_of(tensor, other.learned()[name]) < 2e-2, name


def test_a_gradient_of_zeros_changes_nothing():
    weight, _ = learning()
    weight.step(randn(37, 50, seed=1), 0.1, 0.1)
    before = {name: tensor.clone() for name, tensor in {**weight.learned(), **weight.moments()}.items()}
    assert weight.step(torch.zeros(37, 50), 0.1, 0.1) == 0
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in {**weight.learned(), **weight.moments()}.items()
    )


def test_a_row_without_gradient_keeps_its_signs_and_is_finite():
    weight, _ = learning()
    gradient = randn(37, 50, seed=1)
    gradient[3] = 0
    before = weight.learned()["outer"].clone()
    weight.step(gradient, 0.1, 0.1)
    assert torch.equal(weight.learned()["outer"][3], before[3])
    assert all(bool(tensor.isfinite().all()) for tensor in weight.learned().values())


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-22, 1e-18])
def test_rows_whose_gradient_is_next_to_nothing_stay(size):
    weight, _ = learning()
    gradient = randn(37, 50, seed=1)
    gradient[3] *= size
    before = weight.learned()["outer"].clone()
    weight.step(gradient, 0.1, 0.1)
    after = weight.learned()["outer"]
    assert float((after[3] - before[3]).abs().max()) < 0.01 < float((after[2] - before[2]).abs().max())


def test_signs_follow_a_gradient_that_stays_more_than_noise():
    weight, _ = learning()
    goal, _ = learning()
    goal._outer.values[:, ::2] *= -1  # another weight of the same scales
    first = float((goal.dense() - weight.dense()).square().sum())
    flips = sum(weight.step(weight.dense() - goal.dense(), 0.05, 0.0) for _ in range(40))
    assert flips and float((goal.dense() - weight.dense()).square().sum()) < 0.5 * first
    still, _ = learning()
    assert sum(still.step(randn(37, 50, seed=step), 0.01, 0.0) for step in range(20)) == 0
