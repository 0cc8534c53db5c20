"""Projection onto signs times a rank-one magnitude, and OneBit, which is one such projection.

    P(M) = sign(M) ⊙ (σ · u · vᵀ)       σ, u, v: the top singular triple of |M|;  sign(0) = +1

Source: sign-value-independent decomposition, Xu et al., "OneBit" (arXiv 2402.11295), as used inside the ADMM
of Boža and Macko, "Addition is almost all you need" (arXiv 2505.11076), with its 5 power iterations. The power
iteration starts from ones; the authors' notebook starts from a Gaussian. |M| is non-negative, so that ones are
never orthogonal to v, u and v stay non-negative, and the loop draws no random numbers.

Shape letters: K in_features, N out_features; M here is any matrix [P, Q].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.weighted import WeightedWeight
from dbf_compile.formulas import onebit_bits
from dbf_compile.signs import pack_signs, unpack_signs

POWER_ITERATIONS = 5
TINY = 1e-12  # floor on norms, as in the authors' notebooks
_HALF = torch.finfo(torch.float16)


def rank_one(
    magnitude: Tensor, power_iterations: int = POWER_ITERATIONS, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the nearest rank-one matrix of a non-negative matrix, or of each matrix of a batch.

    ``magnitude [..., P, Q] ≈ rows [..., P] · columns [..., Q]ᵀ``

    Args:
        magnitude: float32 [..., P, Q], non-negative.
        power_iterations: number of updates of both sides, 1 or more.
        start: start of ``columns``, non-negative [..., Q]; None for ones.

    Returns:
        ``rows`` = σ·u and ``columns`` = v of norm 1, both non-negative; zeros for a matrix of zeros.
    """
    columns = magnitude.new_ones(magnitude.shape[-1], 1) if start is None else start[..., None]
    for _ in range(power_iterations):
        rows = _unit(magnitude @ _unit(columns))
        columns = magnitude.mT @ rows
    size = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    return (size * rows)[..., 0], _unit(columns)[..., 0]


def _unit(vector: Tensor) -> Tensor:
    return torch.div(vector, torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(TINY))


def signs_of(matrix: Tensor) -> Tensor:
    """Return the signs of ``matrix`` as +1 and -1 in its dtype, zeros of either sign as +1."""
    # A tenth of the time of torch.where; adding 0 makes +0 of -0.
    return torch.copysign(matrix.new_ones(()), matrix + 0.0)


def half_scales(unit: float, *scales: Tensor) -> tuple[Tensor, ...]:
    """Round scale vectors to float16, all with the same root mean square and with the product kept.

    ``Π result_i = unit · Π scales_i`` up to rounding. float16 reaches from 6e-8 to 65504: a common root mean square
    leaves each vector the most room on both sides.

    Args:
        unit: a factor of the product, divided among the vectors.
        *scales: float32 vectors.

    Returns:
        float16 vectors in the order of ``scales``.

    Raises:
        WeightError: a result would lie outside the normal range of float16.
    """
    sizes = [float(scale.square().mean().sqrt()) for scale in scales]
    product = unit
    for size in sizes:
        product *= size
    if product == 0.0 and 0.0 in (unit, *sizes):
        return tuple(torch.zeros_like(scale, dtype=torch.float16) for scale in scales)
    common = abs(product) ** (1 / len(scales))
    largest = max(float(scale.abs().amax()) / size for scale, size in zip(scales, sizes, strict=True))
    if not (common >= _HALF.tiny and common * largest <= _HALF.max):
        raise WeightError(
            f"a weight whose scales would be about {common:.1e}, up to {common * largest:.1e}",
            f"scales between {_HALF.tiny:.0e} and {_HALF.max:.0e}, the range of float16",
            "multiply the weight by a constant before factoring, and the layer's output by its inverse",
        )
    return tuple((scale * (common / size)).half() for scale, size in zip(scales, sizes, strict=True))


@dataclass(frozen=True, eq=False)
class OneBitFactors:
    """One sign per weight times a rank-one magnitude: ``W ≈ diag(scale_out) · signs · diag(scale_in)``.

    Args:
        signs: int32 words [N, ceil(K / 32)], layout of :mod:`dbf_compile.signs`.
        scale_in: float16 [K].
        scale_out: float16 [N].
    """

    signs: Tensor
    scale_in: Tensor
    scale_out: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the factors stand for, computed in ``dtype``."""
        signs = unpack_signs(self.signs, self.scale_in.numel(), dtype)
        return self.scale_out.to(dtype)[:, None] * signs * self.scale_in.to(dtype)

    def bits(self) -> int:
        """Return the number of stored bits: all words of signs, padding included, and both scales."""
        return onebit_bits(self.scale_in.numel(), self.scale_out.numel())

    def bits_per_weight(self) -> float:
        """Return ``bits() / (N · K)``."""
        return self.bits() / (self.scale_in.numel() * self.scale_out.numel())


@torch.no_grad()
def onebit(weight: Tensor, importance: Importance | None = None) -> OneBitFactors:
    """Factor a weight as OneBit does; the baseline at one bit per weight.

    ``min ‖ diag(rows) · (W − signs ⊙ scale_out · scale_inᵀ) · diag(columns) ‖`` with the importance's weights

    Args:
        weight: floating point [N, K].
        importance: second moments of the layer, or None.

    Raises:
        WeightError: as for ``factorize``.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weighted = WeightedWeight.of(weight, importance)
        rows, columns = rank_one(weighted.matrix.abs())
        scale_in, scale_out = half_scales(weighted.unit, columns / weighted.columns, rows / weighted.rows)
        return OneBitFactors(pack_signs(signs_of(weighted.matrix)), scale_in, scale_out)
