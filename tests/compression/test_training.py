"""Factored layers that are trained: what they compute, what training changes, what comes back."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.tiny import randn
from support.strategies import random_factors
from torch import Tensor, nn

from dbf_compile import machine
from dbf_compile.compression.training import (
    TrainableDoubleBinary,
    TrainableScales,
    sign_confidence,
    train,
    trained_factors,
)
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.signs import pack_signs, unpack_signs

SURE = (torch.ones(()), torch.ones(()))
# Scales in float16 of equal size lose 2^-11 each.
ROUNDING = 3 * 2**-11


def layers(factors, bias=None):
    return {"signs": TrainableDoubleBinary(factors, SURE, bias), "scales": TrainableScales(factors, bias)}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Products are not rounded: what they are compared with is exact."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda kind: False)


def test_rounded_products_change_a_layer_and_its_gradients_by_rounding_alone(monkeypatch):
    factors, x, grad = random_factors(96, 65, 83), randn(40, 96), randn(40, 83, seed=1)

    def of(kind, narrow):
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda _: narrow)
        layer, copy_of_x = layers(factors)[kind], x.clone().requires_grad_()
        parameters = [parameter.requires_grad_(True) for parameter in layer.parameters()]
        with machine.narrow_products(x.device):
            y = layer(copy_of_x)
        y.backward(grad)
        return [y.detach(), copy_of_x.grad, *(parameter.grad for parameter in parameters)]

    for kind in ("signs", "scales"):
        for rounded, exact in zip(of(kind, True), of(kind, False), strict=True):
            assert rounded.dtype == torch.float32
            distance = torch.linalg.vector_norm(rounded - exact) / torch.linalg.vector_norm(exact)
            assert 0 < distance < 2**-6  # a few roundings to 8 bits


@pytest.mark.parametrize("kind", ["signs", "scales"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainable_layer_computes_what_its_factors_stand_for(kind, biased, dtype):
    factors, bias = random_factors(37, 19, 23), randn(23, seed=1) if biased else None
    x = randn(5, 37, dtype=dtype)
    y = layers(factors, bias)[kind](x)
    expected = x.double() @ factors.dense(torch.float64).T + (bias.double() if biased else 0)
    assert y.dtype == dtype and y.shape == (5, 23)
    # float32 sums of 37 and 19 products; then the dtype's own rounding.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert (y.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["signs", "scales"])
def test_untrained_factors_come_back_but_for_rounding(kind):
    stacked = random_factors(37, 19, 50)
    parts = dict(zip("abc", stacked.split([20, 1, 29]), strict=True))
    trainable, owner = {}, None
    for name, part in parts.items():
        make = {
            "signs": lambda p, o: TrainableDoubleBinary(p, SURE, None, o),
            "scales": lambda p, o: TrainableScales(p, None, o),
        }
        trainable[name] = make[kind](part, owner)
        owner = owner or trainable[name]
    factors = trained_factors(trainable)
    assert list(factors) == list(parts)
    for name, part in parts.items():
        exact = part.dense(torch.float64)
        assert (factors[name].dense(torch.float64) - exact).abs().max() <= ROUNDING * exact.abs().max()
        assert factors[name].signs_in is factors["a"].signs_in
    # Those that were factored apart stay apart.
    apart = trained_factors({"a": trainable["a"], "d": layers(random_factors(37, 19, 5, seed=1))[kind]})
    assert apart["a"].signs_in is not apart["d"].signs_in


def test_negative_scales_go_into_the_signs():
    layer = TrainableDoubleBinary(random_factors(12, 6, 9), SURE)
    with torch.no_grad():
        for scale in layer.scales:
            scale[::2] *= -1
        x = randn(4, 12)
        y = layer(x)
    factors = trained_factors({"a": layer})["a"]
    assert all(bool((scale >= 0).all()) for scale in (factors.scale_in, factors.scale_mid, factors.scale_out))
    assert (x @ factors.dense().T - y).abs().max() <= 4 * ROUNDING * y.abs().max()


def test_a_latent_gets_the_gradient_of_its_sign():
    factors = random_factors(8, 5, 6)
    layer = TrainableDoubleBinary(factors, (torch.full((5, 8), 0.25), torch.full((6, 5), 3.0)))
    signs = [
        unpack_signs(factors.signs_in, 8).requires_grad_(),
        unpack_signs(factors.signs_out, 5).requires_grad_(),
    ]
    x, g = randn(3, 8), randn(3, 6, seed=1)
    for latent in layer.latents:
        latent.requires_grad_(True)
    (layer(x) * g).sum().backward()
    scale_in, scale_mid, scale_out = (scale.detach() for scale in layer.scales)
    expected = ((((x * scale_in) @ signs[0].T) * scale_mid) @ signs[1].T * scale_out * g).sum()
    for latent, gradient in zip(layer.latents, torch.autograd.grad(expected, signs), strict=True):
        assert torch.allclose(latent.grad, gradient, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(
    N=st.integers(1, 12),
    K=st.integers(1, 12),
    R=st.integers(1, 9),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
def test_confidence_is_what_flipping_a_sign_costs(N, K, R, seed, weighted):
    weight = randn(N, K, seed=seed)
    importance = (
        Importance(randn(K, seed=1).square() + 0.1, randn(N, seed=2).square() + 0.1) if weighted else None
    )
    factors = factorize(weight, R, importance, FactorizerConfig(iterations=20))
    inner, outer = sign_confidence(weight, factors, importance)
    assert inner.shape == (R, K) and outer.shape == (N, R)
    rows, columns = (importance or Importance()).feature_weights(N, K)

    def error(trial):
        return float((rows[:, None] * (weight - trial.dense(torch.float64)) * columns).square().sum())

    def flipped(name, size, row, column):
        signs = unpack_signs(getattr(factors, name), size)
        signs[row, column] *= -1
        return DoubleBinaryFactors(**{**factors.tensors(), name: pack_signs(signs)})

    base = error(factors)
    costs_out = [[error(flipped("signs_out", R, n, r)) - base for r in range(R)] for n in range(N)]
    costs_in = [[error(flipped("signs_in", K, r, k)) - base for r in range(R)] for k in range(K)]
    for confidence, costs in ((outer, torch.tensor(costs_out)), (inner.T, torch.tensor(costs_in))):
        costs = costs.clamp_min(0)
        relative = costs / costs.mean(1, keepdim=True).clamp_min(1e-30)
        # Costs are differences of sums in float32; rows whose costs vanish have no ratio.
        solid = costs.mean(1) > 1e-4 * base + 1e-9
        assert torch.allclose(confidence[solid], relative[solid].float(), rtol=0.02, atol=0.02)
        assert bool((confidence >= 0).all())


@settings(max_examples=20)
@given(
    N=st.integers(1, 12),
    K=st.integers(1, 12),
    R=st.integers(1, 9),
    seed=st.integers(0, 99),
    whole=st.booleans(),
    forgotten=st.booleans(),
)
def test_before_it_learns_a_layer_has_the_signs_of_its_factors(N, K, R, seed, whole, forgotten):
    weight, x = randn(N, K, seed=seed), randn(40, K, seed=seed + 1)
    importance = Importance(x.T @ x if whole else x.square().mean(0))
    # Hardly searched: flips of single signs gain.
    factors = factorize(weight, R, importance, FactorizerConfig(iterations=1, sweeps=0))
    confidence = sign_confidence(weight, factors, importance)
    if forgotten:
        confidence = tuple(torch.zeros_like(each) for each in confidence)
    inner, outer = TrainableDoubleBinary(factors, confidence).signs()
    assert torch.equal(inner, unpack_signs(factors.signs_in, K))
    assert torch.equal(outer, unpack_signs(factors.signs_out, R))


def fit(layer, weight, rates, epochs=10):
    """Train a layer to give a weight's outputs; return the loss before and after."""
    x, steps = randn(256, weight.shape[1], seed=1), []

    def loss(sample):
        part = x[16 * sample : 16 * sample + 16]
        return (layer(part) - part @ weight.T).square().mean()

    def whole():
        return float(torch.stack([loss(sample) for sample in range(16)]).mean())

    before = whole()
    train(rates, loss, 16, epochs, torch.Generator().manual_seed(0), lambda: steps.append(1))
    assert len(steps) == 16 * epochs
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    return before, whole()


@pytest.mark.parametrize("kind", ["signs", "scales"])
def test_training_scales_finds_those_of_the_weight_and_keeps_the_signs(kind):
    factors = random_factors(16, 12, 24)
    layer = layers(factors)[kind]
    with torch.no_grad():
        for scale in layer.scales:
            scale.mul_(1 + 0.3 * torch.rand(scale.shape, generator=torch.Generator().manual_seed(1)))
    untrained = trained_factors({"a": layer})["a"]
    before, after = fit(layer, factors.dense(), [(layer.scales, 0.02)])
    assert after < 0.01 * before
    assert torch.equal(trained_factors({"a": layer})["a"].signs_out, untrained.signs_out)


def test_training_latents_flips_wrong_signs_that_are_unsure():
    factors = random_factors(16, 12, 24)
    signs = unpack_signs(factors.signs_out, 12)
    wrong = torch.rand(signs.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    spoilt = {**factors.tensors(), "signs_out": pack_signs(torch.where(wrong, -signs, signs))}
    confidence = (torch.ones(12, 16), torch.where(wrong, 0.1, 1.0))
    layer = TrainableDoubleBinary(DoubleBinaryFactors(**spoilt), confidence)
    before, after = fit(layer, factors.dense(), [(layer.latents, 0.005)])
    assert after < 0.1 * before
    assert ((layer.latent_out < 0) != (signs < 0)).sum() < 0.1 * wrong.sum()


def test_equal_seeds_train_alike_and_no_epochs_do_nothing():
    weight, x = randn(24, 16), randn(64, 16, seed=1)
    factors = factorize(weight, 12, None, FactorizerConfig(iterations=5))

    def trained(epochs):
        layer = TrainableDoubleBinary(factors, SURE)

        def loss(sample):
            part = x[8 * sample : 8 * sample + 8]
            return (layer(part) - part @ weight.T).square().mean()

        train([(layer.scales, 0.01)], loss, 8, epochs, torch.Generator().manual_seed(3))
        return trained_factors({"a": layer})["a"]

    first, second = trained(2), trained(2)
    assert all(torch.equal(first.tensors()[name], second.tensors()[name]) for name in first.tensors())
    assert torch.equal(first.signs_in, factors.signs_in)  # only scales were trained
    assert torch.equal(trained(0).scale_out, trained(0).scale_out)
    assert not torch.equal(trained(0).scale_out, first.scale_out)


@pytest.mark.parametrize("kind", ["not called", "called with no rows", "only with padding"])
def test_a_step_changes_what_its_sample_reaches(kind):
    experts = [torch.nn.Linear(4, 4) for _ in range(3)]
    before = [expert.weight.detach().clone() for expert in experts]
    x, changes = randn(6, 2, 4), []

    def loss(sample):
        output = torch.zeros(2, 4)
        for index, expert in enumerate(experts[:2]):  # nothing reaches the third
            rows = (
                x[sample] if index == sample % 2 else x[sample][: 0 if kind == "called with no rows" else 2]
            )
            if index == sample % 2 or kind != "not called":
                share = float(index == sample % 2)  # of padding, the loss counts nothing
                output = output + torch.nn.functional.pad(expert(rows), (0, 0, 0, 2 - len(rows))) * share
        return output.square().mean()

    def step():
        now = [expert.weight.detach().clone() for expert in experts]
        changes.append([not torch.equal(*pair) for pair in zip(now, last, strict=True)])
        last[:] = now

    last = before[:]
    train([([expert.weight for expert in experts], 0.1)], loss, 6, 2, torch.Generator().manual_seed(0), step)
    assert all(first != second and not third for first, second, third in changes[:-1])
    assert not torch.equal(before[0], experts[0].weight) and torch.equal(before[2], experts[2].weight)


def test_samples_that_reach_nothing_change_nothing():
    weight, steps = torch.nn.Parameter(randn(3, 3)), []
    before = weight.detach().clone()
    train([([weight], 0.1)], lambda _: torch.ones(()), 4, 2, torch.Generator(), lambda: steps.append(1))
    assert torch.equal(weight, before) and len(steps) == 8 and not weight.requires_grad


@pytest.mark.parametrize(
    ("target", "kept"), [(1.0, 3), (-1.0, 0), (math.nan, 0)], ids=["better", "worse", "nan"]
)
def test_the_best_state_for_a_judge_is_kept(target: float, kept: int) -> None:
    parameter = nn.Parameter(torch.tensor([0.5]), requires_grad=False)
    seen: list[float] = []

    def judge() -> float:
        seen.append(float((parameter - target).square().sum()))
        return seen[-1]

    arguments = (lambda _: (parameter - 1).square().sum(), 4, 3, torch.Generator().manual_seed(0))
    assert train([([parameter], 0.01)], *arguments, judge=judge) == kept
    assert len(seen) == 6 and (float(parameter) == 0.5) == (kept == 0)
    assert parameter.grad is None and not parameter.requires_grad


@settings(max_examples=25, deadline=None)
@given(share=st.sampled_from([1.0, 0.5, 0.25]), seed=st.integers(0, 99))
def test_the_best_state_may_lie_between_the_first_and_the_last(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, wanted = torch.rand(2, 5, generator=generator) + 1

    def trained(judge: Callable[[Tensor], float] | None) -> tuple[Tensor, int]:
        parameter = nn.Parameter(first.clone(), requires_grad=False)
        asked = None if judge is None else lambda: judge(parameter)
        arguments = (lambda _: (parameter - wanted).square().sum(), 3, 2, torch.Generator())
        return parameter, train([([parameter], 0.01)], *arguments, judge=asked)

    last, _ = trained(None)
    goal = torch.lerp(first, last, share)
    best, kept = trained(lambda now: float((now - goal).abs().max()))
    assert kept == 2
    torch.testing.assert_close(best.detach(), goal, rtol=1e-6, atol=0)
