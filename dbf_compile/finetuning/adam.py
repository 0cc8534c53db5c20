"""Adam on small float32 tensors, with rates relative to the size of each: scales, norms, biases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_BETAS = (0.9, 0.95)
_TINY = 1e-30  # a gradient whose square is less is no gradient


class RelativeAdam:
    """Changes tensors in place by Adam; a rate of 0.01 moves an entry by about a hundredth of the root mean square.

    A tensor whose gradient is all zeros keeps its value and its moments: nothing was learned about it.

    Args:
        values: float32 tensors by name.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)
        self._state = {
            f"{name}.{part}": torch.zeros_like(value)
            for name, value in self._values.items()
            for part in ("mean", "square")
        }
        self._state |= {f"{name}.steps": torch.zeros(()) for name in self._values}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """Change every tensor that has a gradient."""
        for name, gradient in gradients.items():
            if not bool(gradient.any()):
                continue
            value, mean, square, steps = (
                self._values[name],
                *(self._state[f"{name}.{part}"] for part in ("mean", "square", "steps")),
            )
            steps += 1
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.lerp_(gradient.square(), 1 - _BETAS[1])
            corrected = [
                moment / (1 - beta ** float(steps))
                for moment, beta in zip((mean, square), _BETAS, strict=True)
            ]
            size = float(value.square().mean().sqrt())
            value.sub_(corrected[0] / (corrected[1] + _TINY).sqrt(), alpha=rate * size)

    def state(self) -> dict[str, Tensor]:
        """Return the moments by name, not copied: copying into them restores a state."""
        return self._state
