"""Where quality comes from: forms of importance, and budgets, on a small network that has learned something.

python examples/budgets_and_importance.py
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

import dbf_compile

CONFIG = dbf_compile.CompressionConfig(bits_per_weight=1.5, preset="fast", progress=False)


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs [count, 64], of which a few directions matter, and their classes [count]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(count, 8, generator=generator)
    x = hidden @ mixing + 0.1 * torch.randn(count, 64, generator=generator)
    return x, hidden[:, :4].argmax(-1) + 4 * (hidden[:, 4] > 0)


def trained() -> nn.Module:
    """Return a network that tells eight classes apart."""
    torch.manual_seed(0)
    sizes = (64, 128, 128, 64)
    hidden = [layer for k, n in pairwise(sizes) for layer in (nn.Linear(k, n), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(64, 8))
    optimizer, (x, labels) = torch.optim.Adam(model.parameters(), 2e-3), data(2048, seed=2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def main() -> None:
    """Print the accuracy for each form of importance and each budget."""
    model, (x, labels), (seen, seen_labels) = trained(), data(4096, seed=3), data(1024, seed=4)
    print(f"dense: accuracy {(model(x).argmax(-1) == labels).float().mean():.3f}")
    loss = lambda output, batch: nn.functional.cross_entropy(output, seen_labels)  # noqa: E731
    for curvature in ("none", "diagonal", "kronecker"):
        known = curvature != "none"
        importance = dbf_compile.calibrate(model, [seen], loss=loss, curvature=curvature) if known else None
        allocation = dbf_compile.allocate(model, importance, config=CONFIG, multiple=8)
        for budget, chosen in (("equal", None), ("allocated", allocation)):
            small = copy.deepcopy(model)
            dbf_compile.convert_(small, config=CONFIG, importance=importance, allocation=chosen)
            accuracy = (small(x).argmax(-1) == labels).float().mean()
            print(f"importance {curvature:9}  budget {budget:9}  accuracy {accuracy:.3f}")
    print(allocation)


if __name__ == "__main__":
    main()
