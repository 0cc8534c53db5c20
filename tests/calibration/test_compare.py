"""Comparison of two models: divergence, agreement, and the measures of every kind of model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dbf_compile.calibration.compare import agreement, compare, divergence


def test_divergence_is_that_of_distributions_and_leaves_padding_out():
    dense, compressed = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    kl = divergence(dense, compressed, {})
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=dense), torch.distributions.Categorical(logits=compressed)
    )
    assert torch.allclose(kl, expected.flatten(), atol=1e-5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.allclose(
        divergence(dense, compressed, {"attention_mask": mask}), expected[mask.bool()], atol=1e-5
    )
    assert agreement(dense, dense, {"attention_mask": mask}).tolist() == [True] * 3


@given(st.integers(0, 99), st.integers(1, 6))
def test_a_divergence_is_never_negative_and_zero_for_equal_predictions(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    dense, compressed = (torch.randn(2, 3, classes, generator=generator) for _ in range(2))
    assert divergence(dense, compressed, {}).min() >= -1e-6  # float32
    # A constant in all logits of a position changes no prediction.
    assert divergence(dense, dense + 3.0, {}).abs().max() < 1e-5


def test_models_without_tokens_are_compared_by_their_output():
    dense, compressed = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(7, 4)
    lost = (dense(x) - compressed(x)).square().sum() / dense(x).square().sum()
    measured = compare(dense, compressed, x.split(3))
    assert measured["error"] == pytest.approx(float(lost.detach()), rel=1e-5)  # float32 sums
    assert "output" in measured["measure"] and "kl" not in measured


def test_without_a_dense_model_nothing_is_compared():
    assert compare(None, nn.Linear(4, 3), [torch.randn(7, 4)]) == {}
