"""What a block has lost, made up for in closed form by the layer that writes its output.

    output  =  rest + W x                       x [K] flows into the layer, W [N, K]
    W'      =  W + E Xᵀ (X Xᵀ + λ D)⁻¹          X [K, T], E [N, T] = target − output, D = diag(X Xᵀ)

This is the least-squares solution over all windows at once, where training takes steps of a window each. λ keeps it from
learning these windows: the best of some is chosen on other windows.

Source: ridge regression; for layers of quantized models as in QEP (arXiv 2504.09629) and GPTAQ (arXiv 2504.02692), which correct
what flows into a layer and not what has been lost in the output.

Shape letters: K in_features, N out_features, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # λ
_CAREFUL = 1.0  # where there is nothing to choose by
_LINEAR = 0.1  # relative; products in bfloat16 are off by a hundredth, and other layers by about one


@dataclass
class Residuals:
    """Sums over positions: X Xᵀ [K, K], and E Xᵀ [N, K]."""

    inputs: Tensor
    errors: Tensor

    @staticmethod
    def of(pairs: Iterable[tuple[Tensor, Tensor]]) -> Residuals | None:
        """Sum over pairs of inputs [..., K] and errors [..., N]; None where there are none."""
        total: Residuals | None = None
        for inputs, errors in pairs:
            x, e = inputs.float().flatten(0, -2), errors.float().flatten(0, -2)
            if total is None:
                total = Residuals(x.mT @ x, e.mT @ x)
            else:
                total.inputs.addmm_(x.mT, x)
                total.errors.addmm_(e.mT, x)
        return total

    def correction(self, strength: float) -> Tensor:
        """Return E Xᵀ (X Xᵀ + λ D)⁻¹ [N, K]; features that are always 0 get none."""
        scale = self.inputs.diagonal().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        scaled = self.inputs * scale * scale[:, None]
        scaled.diagonal().add_(strength)
        # λ is no smaller than a hundredth and the largest eigenvalue no larger than K: float32 is enough.
        factor = torch.linalg.cholesky_ex(scaled).L  # of numbers that are not finite, it is not finite either
        return torch.cholesky_solve((self.errors * scale).mT, factor).mT * scale

    def gain(self, correction: Tensor, weights: Tensor) -> float:
        """Return by how much Σ o ⊙ E² falls on these positions.

        Args:
            correction: of the weight, [N, K].
            weights: o of the outputs, [N].
        """
        per_output = (correction * (2 * self.errors - correction @ self.inputs)).sum(1)
        return float((weights * per_output).sum())


def best_correction(training: Residuals, judging: Residuals | None, weights: Tensor) -> Tensor | None:
    """Return the correction that helps most on the windows that judge, or None where none does.

    Args:
        training: of the windows to learn from.
        judging: of others; None where there are none.
        weights: of the outputs [N].
    """
    if judging is None:
        careful = training.correction(_CAREFUL)
        return careful if bool(torch.isfinite(careful).all()) else None
    best, most = None, 0.0
    for strength in _STRENGTHS:
        correction = training.correction(strength)
        gain = judging.gain(correction, weights)
        if gain > most:  # never NaN
            best, most = correction, gain
    return best


@torch.no_grad()
def writes_output(weight: Tensor, run: Callable[[], tuple[Tensor | None, Tensor]]) -> bool:
    """Return whether what a layer returns is a summand of a block's output.

    Args:
        weight: of the layer, [N, K]; changed in place, afterwards as before.
        run: runs the block and returns what flows into the layer [..., K], None for nothing, and the output [..., features].
    """
    inputs, output = run()
    if inputs is None or inputs.shape[:-1] != output.shape[:-1] or weight.shape[0] != output.shape[-1]:
        return False
    own = weight.clone()
    weight.mul_(0.5)
    changed = run()[1]
    weight.copy_(own)
    expected = inputs.float() @ (own.float() * -0.5).mT
    difference = torch.linalg.vector_norm(changed.float() - output.float() - expected)
    return bool(difference <= _LINEAR * torch.linalg.vector_norm(expected))
