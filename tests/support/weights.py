"""Weights and importances to factor, drawn from seeds, and what tests ask about their factors."""

from __future__ import annotations

import torch
from torch import Tensor

from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a float32 matrix of standard normal numbers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_importance(out_features: int, in_features: int, seed: int = 0) -> Importance:
    """Return diagonal moments over several orders of magnitude."""
    return Importance(
        gaussian(in_features, 1, seed + 1)[:, 0] ** 4, gaussian(out_features, 1, seed + 2)[:, 0] ** 4
    )


def covariance(size: int, seed: int = 0) -> Tensor:
    """Return a whole moment [size, size] with a decaying spectrum, as activations have."""
    basis = torch.linalg.qr(gaussian(size, size, seed))[0]
    moment = (basis * 0.8 ** torch.arange(size)) @ basis.T
    return (moment + moment.T) / 2


def correlations(size: int, seed: int = 0) -> Tensor:
    """Return a metric [size, size]: positive definite, ones on the diagonal."""
    root = torch.nn.functional.normalize(gaussian(size, size + 2, seed), dim=1)
    return root @ root.T


def equal_factors(left: DoubleBinaryFactors, right: DoubleBinaryFactors) -> bool:
    """Return whether factors are equal bit for bit."""
    pairs = zip(left.tensors().values(), right.tensors().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def rms(tensor: Tensor) -> float:
    """Return the root mean square."""
    return float(tensor.double().square().mean().sqrt())
