"""The loss of finetuning: how far predictions are from those of the dense model, of which the likeliest tokens are known.

    KL_t  =  Σ_{i ∈ S} p_i log(p_i / q_i)  +  p_rest log(p_rest / q_rest)            S: the dense model's likeliest tokens

p are the probabilities of the dense model at position t, q those of the model that learns. The tokens outside of S count as
one. So KL_t is at most the divergence over the whole vocabulary, and is 0 where both models agree on S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_AT_A_TIME = 2**23  # logits in float32
_TINY = 1e-30


class _TopDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_p: Tensor, rest: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        rows = max(1, _AT_A_TIME // logits.shape[-1])
        total = logits.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            wide = logits[part].float()
            log_sum = wide.logsumexp(-1, keepdim=True)
            log_q = wide.gather(-1, tokens[part]) - log_sum
            p, q = log_p[part].exp(), log_q.exp()
            # Summed, as 1 - Σ q is but rounding where the model is sure.
            others = (wide - log_sum).exp_().scatter_(-1, tokens[part], 0.0)
            q_rest = others.sum(-1).clamp_min(_TINY)
            # A model may rule tokens out: 0 log 0 is 0.
            kl = torch.where(p > 0, p * (log_p[part] - log_q), 0.0).sum(-1)
            kl += torch.where(rest[part] > 0, rest[part] * (rest[part].clamp_min(_TINY) / q_rest).log(), 0.0)
            total += kl.sum()
            if gradient is not None:
                # q - p inside of S; outside all q are to grow or shrink by one factor.
                others.mul_((1 - rest[part] / q_rest)[:, None])
                gradient[part] = others.scatter_(-1, tokens[part], q - p)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None, None, None


class Targets(NamedTuple):
    """Predictions of the dense model at T positions.

    Args:
        tokens: S, its likeliest tokens, int64 [T, top].
        log_p: logarithms of their probabilities, float32 [T, top].
        rest: probability of all other tokens, float32 [T]; with those of S they sum to 1.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor


def top_divergence(logits: Tensor, targets: Targets) -> Tensor:
    """Return Σ_t KL_t in nats, float32.

    Args:
        logits: of the model that learns, floating point [T, V].
        targets: predictions of the dense model at the same positions.
    """
    loss: Tensor = _TopDivergence.apply(logits, targets.tokens, targets.log_p, targets.rest)  # type: ignore[no-untyped-call]
    return loss


def hidden_error(hidden: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return Σ_t ‖h_t - h*_t‖² over the mean of ‖h*_t‖², the mean over layers, float32.

    Args:
        hidden: hidden states h of every layer of the model that learns, floating point [batch, tokens, features].
        target: h*, those of the dense model.
    """
    errors = []
    for one, other in zip(hidden, target, strict=True):
        wide = other.float()
        power = wide.square().sum(-1).mean().clamp_min(_TINY)
        errors.append((one.float() - wide).square().sum() / power)
    return torch.stack(errors).mean()
