"""Your own module: measure what matters, factor it, keep the factors, compile, and compare with the dense one.

python examples/compile_your_module.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import dbf_compile


class Network(nn.Module):
    """Two linear layers with a residual: put your own module here."""

    def __init__(self, features: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., features] for x of the same shape."""
        return x + self.down(nn.functional.gelu(self.up(x)))


def main() -> None:
    """Go the whole way with one module."""
    torch.manual_seed(0)
    dense = Network().eval().requires_grad_(False)
    # Inputs of real data are far from even: here a few features are large.
    batches = [torch.randn(64, 128) * torch.linspace(0.1, 3, 128) ** 2 for _ in range(4)]
    x = batches.pop()

    importance = dbf_compile.calibrate(dense, batches)
    for name, known in (("none", None), ("measured", importance)):
        model = copy.deepcopy(dense)
        dbf_compile.convert_(model, importance=known, bits_per_weight=3.0, preset="fast", progress=False)
        error = (model(x) - dense(x)).norm() / dense(x).norm()
        print(f"importance {name:8}  relative error of the output {error:.3f}")

    factors = dbf_compile.factorize_model(
        dense, importance=importance, bits_per_weight=3.0, preset="fast", progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factors.safetensors"
        dbf_compile.save(factors, path)
        # The backend takes the factors from the file; nothing is factored again.
        compiled = torch.compile(dense, backend="dbf", options={"checkpoint": str(path)})
        y = compiled(x)
    print(f"compiled and eager differ by {(y - model(x)).abs().max() / y.abs().max():.1e}")
    stored = sum(one.bits() for one in factors.values()) / 8e3
    print(f"weights: {stored:.0f} kB, dense {sum(p.nbytes for p in dense.parameters()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
