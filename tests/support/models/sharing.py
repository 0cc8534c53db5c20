"""A model of three factored layers, two of which share their first stage."""

import torch
from support.strategies import random_factors
from torch import Tensor, nn

from dbf_compile.linear import swap_


class Siblings(nn.Module):
    """q and k read one input; o reads q."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(64, 40), nn.Linear(64, 24), nn.Linear(40, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.o(self.q(x)), self.k(x)


def sharing(seed: int = 0) -> nn.Module:
    """Return the model, without gradients."""
    torch.manual_seed(seed)
    q, k = random_factors(64, 37, 64, seed).split([40, 24])
    factors = {"q": q, "k": k, "o": random_factors(40, 30, 64, seed)}
    return swap_(Siblings().requires_grad_(False), factors)
