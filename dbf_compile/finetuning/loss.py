"""The loss of finetuning: how far predictions are from those of the dense model, of which a few tokens a position are known.

    KL_t  =  Σ_{i ∈ S} p_i log(p_i / q_i)  +  (1 - Σ_{i ∈ S} p_i) · mean_{j ∈ D} log(p_j / q_j)

p are the probabilities of the dense model at position t, q those of the model that learns. S are the dense model's likeliest tokens,
D others, drawn by their probabilities. So KL_t and its gradient are in the mean those over the whole vocabulary, and KL_t is 0
where both models agree. If all tokens outside of S counted as one, nobody would say which of them are likely: on SmolLM2 an
eighth of the divergence is theirs, and it grew in training.

Source: drawn tokens as in Sparse Logit Sampling (arXiv 2503.16870), where all of them are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_AT_A_TIME = 2**23  # logits in float32
_TINY = 1e-30


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_p: Tensor, weight: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        rows = max(1, _AT_A_TIME // logits.shape[-1])
        total = logits.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            log_q = logits[part].float()
            log_q = log_q - log_q.logsumexp(-1, keepdim=True)
            # A model may rule tokens out: 0 log 0 is 0.
            gap = log_p[part] - log_q.gather(-1, tokens[part])
            total += torch.where(weight[part] > 0, weight[part] * gap, 0.0).sum()
            if gradient is not None:
                # q - p; a token that was drawn twice counts twice, by equal parts, so that their order changes no bit.
                gradient[part] = log_q.exp_().scatter_add_(-1, tokens[part], -weight[part])
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None, None, None


class Targets(NamedTuple):
    """Predictions of the dense model at T positions.

    Args:
        tokens: those of S and of D, int64 [T, n]; a token of D may be there more than once.
        log_p: logarithms of their probabilities, float32 [T, n].
        weight: what each counts, float32 [T, n]: its probability if it is of S, an equal part of what S leaves if it is of D.
            The sum over a position is 1.
    """

    tokens: Tensor
    log_p: Tensor
    weight: Tensor


def divergence(logits: Tensor, targets: Targets) -> Tensor:
    """Return Σ_t KL_t in nats, float32.

    Args:
        logits: of the model that learns, floating point [T, V].
        targets: predictions of the dense model at the same positions.
    """
    loss: Tensor = _Divergence.apply(logits, targets.tokens, targets.log_p, targets.weight)  # type: ignore[no-untyped-call]
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
