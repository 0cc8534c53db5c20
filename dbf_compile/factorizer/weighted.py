"""A weight in the form that is factored: scaled by its importance, with metrics that couple rows and columns.

    tr(L E R Eᵀ) = unit² · tr(L̃ Ẽ R̃ Ẽᵀ)        Ẽ = diag(rows) · E · diag(columns) / unit

The vectors ``rows`` and ``columns`` hold what L and R say of single features, up to constant factors. The metrics L̃ and
R̃ hold the rest: they have ones on their diagonals, and are identities where L and R are diagonal.

Shape letters: K in_features, N out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.importance import Importance


@dataclass(frozen=True, eq=False)
class WeightedWeight:
    """A weight that is scaled by its importance: ``W = unit · diag(1 / rows) · matrix · diag(1 / columns)``.

    Args:
        matrix: W̃, float32 [N, K] with root mean square 1, or all zeros.
        rows: weights of the rows, float32 [N], positive.
        columns: weights of the columns, float32 [K], positive.
        unit: divisor of ``matrix``; 0 for a weight of zeros.
        row_metric: L̃, float32 [N, N] with ones on the diagonal, or None for the identity.
        column_metric: R̃, float32 [K, K] with ones on the diagonal, or None for the identity.
    """

    matrix: Tensor
    rows: Tensor
    columns: Tensor
    unit: float
    row_metric: Tensor | None = None
    column_metric: Tensor | None = None

    @property
    def transposed(self) -> WeightedWeight:
        """The transposed weight."""
        return WeightedWeight(
            self.matrix.T.contiguous(),
            self.columns,
            self.rows,
            self.unit,
            self.column_metric,
            self.row_metric,
        )

    @staticmethod
    def of(weight: Tensor, importance: Importance | None = None) -> WeightedWeight:
        """Check a weight and scale it.

        Args:
            weight: floating point [N, K], on any device; not changed.
            importance: second moments of the layer, or None.

        Raises:
            WeightError: the weight is no non-empty floating-point matrix, it has NaN or infinite entries, or the
                importance does not fit it.
        """
        _check_weight(weight)
        importance = importance or Importance()
        rows, columns = importance.feature_weights(weight.shape[0], weight.shape[1], weight.device)
        metrics = importance.metrics(weight.device)
        # Entries near the ends of float32 would overflow or vanish when squared: the largest becomes 1 first.
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        peak = float(exact.abs().amax())
        if peak == 0.0:
            return WeightedWeight(exact.float(), rows, columns, 0.0, *metrics)
        matrix = rows[:, None] * (exact / peak).float() * columns
        size = float(matrix.square().mean().sqrt())
        return WeightedWeight(matrix / size, rows, columns, peak * size, *metrics)


def apply_metrics(matrix: Tensor, row_metric: Tensor | None, column_metric: Tensor | None) -> Tensor:
    """Return ``L · matrix · R`` for a matrix [..., P, Q] and metrics [..., P, P] and [..., Q, Q]; None is the identity."""
    left = matrix if row_metric is None else row_metric @ matrix
    return left if column_metric is None else left @ column_metric


def squared_norm(matrix: Tensor, row_metric: Tensor | None, column_metric: Tensor | None) -> float:
    """Return ``tr(L · matrix · R · matrixᵀ)``, summed in float64; None is the identity."""
    return float((apply_metrics(matrix, row_metric, column_metric) * matrix).sum(dtype=torch.float64))


def _check_weight(weight: object) -> None:
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.dim() != 2
        or weight.numel() == 0
    ):
        got = (
            f"of dtype {weight.dtype} and shape {tuple(weight.shape)}"
            if isinstance(weight, Tensor)
            else f"of type {type(weight).__name__}"
        )
        raise WeightError(
            f"a weight {got}", "a non-empty floating-point matrix [N, K]", "dequantize or reshape it first"
        )
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(
            "a weight with NaN or infinite entries",
            "finite entries",
            "check the checkpoint it was loaded from",
        )
