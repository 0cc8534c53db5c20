"""The loss: its value and gradient against plain torch, with few and with all tokens known."""

import pytest
import torch
from support.models.tiny import randn

from dbf_compile.finetuning import loss as module
from dbf_compile.finetuning.loss import Targets, divergence, hidden_error


def targets_of(logits, top, drawn=6):
    """Return the likeliest tokens and some of the others, drawn by their probabilities."""
    log_p = torch.log_softmax(logits, -1)
    tokens = log_p.topk(top).indices
    others = log_p.exp().scatter(-1, tokens, 0.0)
    weight = log_p.gather(-1, tokens).exp()
    if top < logits.shape[-1] and drawn:
        generator = torch.Generator().manual_seed(0)
        more = torch.multinomial(others, drawn, replacement=True, generator=generator)
        rest = others.sum(-1, keepdim=True) / drawn
        tokens, weight = torch.cat([tokens, more], -1), torch.cat([weight, rest.expand(-1, drawn)], -1)
    return Targets(tokens, log_p.gather(-1, tokens), weight)


def narrow_of(targets):
    return Targets(targets.tokens, targets.log_p.float(), targets.weight.float())


def plain(logits, targets):
    log_q = torch.log_softmax(logits, -1)
    return (targets.weight * (targets.log_p - log_q.gather(-1, targets.tokens))).sum()


def whole(logits, dense):
    log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(dense, -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


@pytest.mark.parametrize("at_a_time", [1, 37 * 3, 2**23])
@pytest.mark.parametrize("top", [1, 5, 36, 37])
def test_value_and_gradient_are_those_of_plain_torch(monkeypatch, top, at_a_time):
    monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)
    logits = randn(7, 37, dtype=torch.float64).requires_grad_()
    targets = targets_of(randn(7, 37, seed=1, dtype=torch.float64), top)
    expected = plain(logits, targets)
    (gradient,) = torch.autograd.grad(expected, logits)
    narrow = logits.detach().float().requires_grad_()
    actual = divergence(narrow, narrow_of(targets))
    (3 * actual).backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(narrow.grad.double(), 3 * gradient, atol=1e-5)


def test_in_the_mean_value_and_gradient_are_those_over_the_whole_vocabulary():
    logits = randn(4, 19, dtype=torch.float64).requires_grad_()
    dense = randn(4, 19, seed=1, dtype=torch.float64)
    expected = whole(logits, dense)
    (gradient,) = torch.autograd.grad(expected, logits)
    draws = 200_000
    targets = targets_of(dense, 5, draws)
    narrow = logits.detach().float().requires_grad_()
    actual = divergence(narrow, narrow_of(targets))
    actual.backward()
    # The mean of so many draws is within a few hundredths of a percent.
    assert actual.item() == pytest.approx(expected.item(), rel=5e-3)
    assert torch.allclose(narrow.grad.double(), gradient, atol=2e-3)


@pytest.mark.parametrize("top", [3, 19])
def test_equal_models_have_no_divergence(top):
    dense = randn(4, 19)
    assert float(divergence(dense, targets_of(dense, top))) == pytest.approx(0, abs=1e-5)


def test_all_tokens_give_the_divergence():
    dense, other = randn(4, 19), randn(4, 19, seed=1)
    expected = float(whole(other, dense))
    assert float(divergence(other, targets_of(dense, 19))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("top", [3, 9])
def test_tokens_that_a_model_rules_out_count_nothing(top):
    dense = randn(4, 9)
    dense[:, 2:5] = -torch.inf
    logits = randn(4, 9, seed=1).masked_fill(dense.isinf(), -torch.inf).requires_grad_()
    loss = divergence(logits, targets_of(dense, top))
    loss.backward()
    assert bool(loss.isfinite()) and bool(logits.grad.isfinite().all())


def test_logits_stay_as_they_are():
    logits = randn(4, 9).requires_grad_()
    before = logits.detach().clone()
    divergence(logits, targets_of(randn(4, 9, seed=1), 3))
    assert torch.equal(logits, before)


def test_half_precision_rounds_the_gradient_alone():
    logits = randn(5, 33).bfloat16().requires_grad_()
    wide = logits.detach().float().requires_grad_()
    targets = targets_of(randn(5, 33, seed=1), 8)
    one, other = divergence(logits, targets), divergence(wide, targets)
    assert torch.equal(one, other)
    one.backward()
    other.backward()
    assert torch.equal(logits.grad, wide.grad.bfloat16())


def test_hidden_states_are_compared_by_their_own_size():
    states = (randn(1, 3, 8), 100 * randn(1, 3, 8, seed=1))
    assert float(hidden_error(states, states)) == 0
    doubled = tuple(2 * state for state in states)
    assert float(hidden_error(doubled, states)) == pytest.approx(3)  # positions
