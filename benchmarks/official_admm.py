"""The authors' factorizer, for comparison: the steps of their notebooks in the same order.

Source: Boža and Macko, "Addition is almost all you need" (arXiv 2505.11076), notebooks of github.com/usamec/double_binary,
rewritten. A half step takes two inverses and three solves; a projection takes five power iterations from a random start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.weighted import WeightedWeight

ITERATIONS, INNER, RIDGE = 260, 3, 0.03


@torch.no_grad()
def official(weight: Tensor, mid_features: int, importance: Importance | None, seed: int = 0) -> float:
    """Return the weighted error of the authors' float32 factors, before scales are rounded."""
    torch.manual_seed(seed)
    target = WeightedWeight.of(weight, importance).matrix
    if target.shape[0] >= target.shape[1]:
        target = target.T
    rows, columns = target.shape
    left, right = torch.randn(rows, mid_features), torch.randn(mid_features, columns)
    left_dual, right_dual = torch.zeros_like(left), torch.zeros_like(right)
    for step in range(ITERATIONS):
        rho = min(1.0, step / (ITERATIONS - 3)) ** 3
        scale = right.norm(dim=1) + 1e-12
        left, left_dual = (item.T for item in _half_step(right.T / scale, target.T, left.T, left_dual.T, rho))
        scale = left.norm(dim=0) + 1e-12
        right, right_dual = _half_step(left / scale, target, right, right_dual, rho)
    residual = target - (left / scale) @ right
    return float(residual.square().sum() / target.square().sum())


def _half_step(
    basis: Tensor, target: Tensor, primal: Tensor, dual: Tensor, rho: float
) -> tuple[Tensor, Tensor]:
    normal = basis.T @ basis
    normal = normal + torch.diag(torch.ones_like(normal.diag())) * normal.diag().mean() * RIDGE
    projected = basis.T @ target
    identity = torch.eye(normal.shape[0])
    inverse, first = torch.inverse(normal + identity), torch.inverse(normal + identity * rho)
    solution = first @ (projected + rho * (primal - dual))
    for _ in range(INNER - 1):
        primal = _project(solution + dual)
        dual = dual + (solution - primal)
        solution = inverse @ (projected + (primal - dual))
    primal = _project(solution + dual)
    return primal, dual + (solution - primal)


def _project(matrix: Tensor) -> Tensor:
    signs = matrix.sign()
    signs[signs == 0] = 1
    magnitude = matrix.abs()
    right = torch.randn(matrix.shape[1])
    right = right / right.norm()
    for _ in range(5):
        left = torch.mv(magnitude, right)
        left = left / left.norm()
        right = torch.mv(magnitude.T, left)
        right = right / right.norm()
    left = torch.mv(magnitude, right)
    size = left.norm()
    return size * torch.outer(left / size, right) * signs
