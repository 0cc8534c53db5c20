"""Small models to calibrate, their batches, and the state that calibration must leave as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.models.tiny import tiny_bert, tiny_llama
from torch import Tensor, nn


class Net(nn.Module):
    """Two linears with an in-place activation between, a dropout, and a third linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.dropout(self.first(x * scale)).relu_())


class WithLoss(nn.Module):
    """Returns an object that carries a loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"loss": self.net(x).square().mean()})()


def net_batches() -> list[Tensor]:
    """Return two batches for :class:`Net`, of 4 and of 12 positions."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 4, 5, generator=generator) for rows in (1, 3)]


def squared_sum(output: Tensor, batch: Any) -> Tensor:
    """A loss that needs no labels."""
    return output.square().sum()


def tiny(kind: str) -> nn.Module:
    """Return a causal language model ("causal"), a masked one ("masked"), or an encoder without a head ("encoder")."""
    if kind == "causal":
        return tiny_llama()
    if kind == "encoder":
        return tiny_bert()
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(tiny_bert().config).eval()


def tokens(count: int = 4, length: int = 12) -> list[dict[str, Tensor]]:
    """Return batches of two windows of tokens that every tiny model knows."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 256, (2, length), generator=generator)} for _ in range(count)]


def state_of(model: nn.Module, batches: Sequence[Tensor] = ()) -> list[Any]:
    """Return everything that calibration could leave changed: modes, gradients, parameters, hooks, global state."""
    return [
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [batch.grad for batch in batches],
        torch.is_grad_enabled(),
        torch.random.get_rng_state(),
    ]


def same(before: Any, after: Any) -> bool:
    """Return whether two states are equal, tensors bit for bit."""
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)
