"""The loss: its value and gradient against plain torch, with few and with all tokens known."""

import pytest
import torch
from support.models.tiny import randn

from dbf_compile.finetuning import loss as module
from dbf_compile.finetuning.loss import Targets, hidden_error, top_divergence


def targets_of(logits, top):
    log_p = torch.log_softmax(logits, -1)
    best, tokens = log_p.topk(top)
    return Targets(tokens, best, log_p.exp().scatter(-1, tokens, 0.0).sum(-1))


def plain(logits, targets):
    log_q = torch.log_softmax(logits, -1)
    kept = log_q.gather(-1, targets.tokens)
    rest = 1 - kept.exp().sum(-1)
    p = targets.log_p.exp()
    kl = (p * (targets.log_p - kept)).sum(-1)
    return (kl + targets.rest * (targets.rest / rest).log()).sum()


@pytest.mark.parametrize("at_a_time", [1, 37 * 3, 2**23])
@pytest.mark.parametrize("top", [1, 5, 36])
def test_value_and_gradient_are_those_of_plain_torch(monkeypatch, top, at_a_time):
    monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)
    logits = randn(7, 37, dtype=torch.float64).requires_grad_()
    targets = targets_of(randn(7, 37, seed=1, dtype=torch.float64), top)
    expected = plain(logits, targets)
    (gradient,) = torch.autograd.grad(expected, logits)
    narrow = logits.detach().float().requires_grad_()
    actual = top_divergence(narrow, Targets(targets.tokens, targets.log_p.float(), targets.rest.float()))
    (3 * actual).backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(narrow.grad.double(), 3 * gradient, atol=1e-5)


def test_all_tokens_give_the_divergence_and_equal_models_none():
    dense = randn(4, 19)
    assert float(top_divergence(dense, targets_of(dense, 19))) == pytest.approx(0, abs=1e-5)
    other = randn(4, 19, seed=1)
    kl = torch.nn.functional.kl_div(
        torch.log_softmax(other, -1), torch.log_softmax(dense, -1), log_target=True, reduction="sum"
    )
    assert float(top_divergence(other, targets_of(dense, 19))) == pytest.approx(float(kl), rel=1e-4)


def test_what_sure_models_leave_to_others_is_no_rounding():
    sure = torch.cat([torch.full((3, 2), 20.0), randn(3, 60)], 1).double()
    logits = (sure + randn(3, 62, seed=1)).requires_grad_()
    targets = targets_of(sure, 2)
    others = torch.log_softmax(logits, -1).scatter(-1, targets.tokens, -torch.inf).logsumexp(-1)
    kept = torch.log_softmax(logits, -1).gather(-1, targets.tokens)
    expected = (targets.log_p.exp() * (targets.log_p - kept)).sum()
    expected = expected + (targets.rest * (targets.rest.log() - others)).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    narrow = logits.detach().float().requires_grad_()
    top_divergence(narrow, Targets(targets.tokens, targets.log_p.float(), targets.rest.float())).backward()
    assert torch.allclose(narrow.grad.double()[:, 2:], gradient[:, 2:], rtol=1e-3, atol=0)


@pytest.mark.parametrize("top", [3, 9])
def test_tokens_that_a_model_rules_out_count_nothing(top):
    dense = randn(4, 9)
    dense[:, 2:5] = -torch.inf
    logits = randn(4, 9, seed=1).masked_fill(dense.isinf(), -torch.inf).requires_grad_()
    loss = top_divergence(logits, targets_of(dense, top))
    loss.backward()
    assert bool(loss.isfinite()) and bool(logits.grad.isfinite().all())


def test_logits_stay_as_they_are():
    logits = randn(4, 9).requires_grad_()
    before = logits.detach().clone()
    top_divergence(logits, targets_of(randn(4, 9, seed=1), 3))
    assert torch.equal(logits, before)


def test_half_precision_rounds_the_gradient_alone():
    logits = randn(5, 33).bfloat16().requires_grad_()
    wide = logits.detach().float().requires_grad_()
    targets = targets_of(randn(5, 33, seed=1), 8)
    one, other = top_divergence(logits, targets), top_divergence(wide, targets)
    assert torch.equal(one, other)
    one.backward()
    other.backward()
    assert torch.equal(logits.grad, wide.grad.bfloat16())


def test_hidden_states_are_compared_by_their_own_size():
    states = (randn(1, 3, 8), 100 * randn(1, 3, 8, seed=1))
    assert float(hidden_error(states, states)) == 0
    doubled = tuple(2 * state for state in states)
    assert float(hidden_error(doubled, states)) == pytest.approx(3)  # positions
