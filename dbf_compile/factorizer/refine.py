"""Refinement of a finished factorization: least squares for the scales, descent for single signs.

    J = tr(L · E · R · Eᵀ)        E [P, Q] = target − diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

``target`` is the weighted matrix of :class:`~dbf_compile.factorizer.weighted.WeightedWeight`, L [P, P] and
R [Q, Q] its metrics; without them J is the squared Frobenius norm of E. Every step is exact in one block of
unknowns with all others fixed, so J never rises.

Source: the refits are linear least squares. Flipping the sign x of entry (p, r) changes the error of row p by
2 x a g, g = row r of diag(scale_mid) · signs_in · diag(scale_in), and J by 4 x a (E R gᵀ)_p + 4 a² g R gᵀ.

Shape letters: P and Q are the sides of the target, M mid_features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dbf_compile.factorizer.projection import signs_of
from dbf_compile.factorizer.weighted import apply_metrics, squared_norm

# Added to the diagonal of normal equations, relative to its mean: components may be parallel.
_JITTER = 1e-6
# A flip must gain more than float32 sums of this many terms can err, or rows would flip to and fro.
_LEAST_GAIN = 1e-6
_MAX_FLIPS = 64  # single flips of a row in one pass; few need more than a dozen


class Product(NamedTuple):
    """A double binary product: ``diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)``.

    All tensors are float32: signs_out [P, M] and signs_in [M, Q] of ±1, scale_out [P], scale_mid [M],
    scale_in [Q].
    """

    signs_out: Tensor
    signs_in: Tensor
    scale_out: Tensor
    scale_mid: Tensor
    scale_in: Tensor

    @property
    def outer(self) -> Tensor:
        """``diag(scale_out) · signs_out`` [P, M]."""
        return self.scale_out[:, None] * self.signs_out

    @property
    def inner(self) -> Tensor:
        """``signs_in · diag(scale_in)`` [M, Q]."""
        return self.signs_in * self.scale_in

    def dense(self) -> Tensor:
        """Return the product [P, Q]."""
        return (self.outer * self.scale_mid) @ self.inner

    @property
    def nonnegative(self) -> Product:
        """The same product with scales of 0 or more: what was negative has gone into the signs."""
        out, mid, into = (signs_of(scale) for scale in self[2:])
        return Product(
            self.signs_out * out[:, None],
            self.signs_in * mid[:, None] * into,
            *(scale.abs() for scale in self[2:]),
        )

    @property
    def transposed(self) -> Product:
        """The product of the transposed target."""
        return Product(self.signs_in.T, self.signs_out.T, self.scale_in, self.scale_mid, self.scale_out)


def squared_error(
    target: Tensor, product: Product, row_metric: Tensor | None = None, column_metric: Tensor | None = None
) -> float:
    """Return J of ``product`` for ``target [P, Q]`` and the metrics L [P, P], R [Q, Q] (None for identity)."""
    return squared_norm(target - product.dense(), row_metric, column_metric)


def refine(
    target: Tensor,
    product: Product,
    row_metric: Tensor | None = None,
    column_metric: Tensor | None = None,
    sweeps: int = 2,
) -> Product:
    """Return a product at least as good: ``sweeps`` times signs by descent, then scales by least squares.

    Signs of a side are left alone where the metric of that side couples their rows.

    Args:
        target: float32 [P, Q].
        product: where to start.
        row_metric: L, positive semidefinite [P, P], or None for the identity.
        column_metric: R, positive semidefinite [Q, Q], or None for the identity.
        sweeps: how often; 0 returns ``product``.
    """
    best, error = product, squared_error(target, product, row_metric, column_metric)
    for _ in range(sweeps):
        found = best
        if row_metric is None:
            found = flip_signs(target, found, column_metric)
        if column_metric is None:
            found = flip_signs(target.T, found.transposed, row_metric).transposed
        found = refit_scales(target, found, row_metric, column_metric)
        found_error = squared_error(target, found, row_metric, column_metric)
        if not found_error < error:  # nothing left but rounding, or a system that was singular
            break
        best, error = found, found_error
    return best


def refit_scales(
    target: Tensor, product: Product, row_metric: Tensor | None = None, column_metric: Tensor | None = None
) -> Product:
    """Return ``product`` with ``scale_mid``, ``scale_out`` and ``scale_in`` fitted in turn, signs kept.

    ``[(Fᵀ L F) ⊙ (G R Gᵀ)] scale_mid = diag(Fᵀ L W R Gᵀ)``     F = outer [P, M], G = inner [M, Q]
    ``[L ⊙ (H R Hᵀ)] scale_out = diag(L W R Hᵀ)``               H = signs_out · diag(scale_mid) · inner [P, Q]

    and the mirror image of the latter for ``scale_in``. Arguments as for :func:`refine`.
    """
    outer, inner = product.outer, product.inner
    weighted = apply_metrics(outer, row_metric, None)  # L F
    projected = apply_metrics(weighted.T @ target, None, column_metric)  # Fᵀ L W R
    mid = _fit(
        (outer.T @ weighted) * (apply_metrics(inner, None, column_metric) @ inner.T),
        (projected * inner).sum(1),
    )
    product = product._replace(scale_mid=mid)
    product = product._replace(scale_out=_fit_side(target, product, row_metric, column_metric))
    return product._replace(scale_in=_fit_side(target.T, product.transposed, column_metric, row_metric))


def flip_costs(target: Tensor, product: Product, column_metric: Tensor | None = None) -> Tensor:
    """Return by how much J rises [P, M] if one sign of ``signs_out`` is flipped and all else stays.

    Arguments as for :func:`flip_signs`, at whose result no cost is negative beyond rounding.
    """
    rows, weighted, fields = _fields(target, product, column_metric)
    scale = product.scale_out[:, None]
    return 4 * scale * (product.signs_out * fields + scale * (weighted * rows).sum(1))


def flip_signs(target: Tensor, product: Product, column_metric: Tensor | None = None) -> Product:
    """Return ``product`` after flipping, in every row of ``signs_out`` at a time, the sign that gains most.

    Rows do not touch each other, so all move at once; a row rests when no single flip gains.

    Args:
        target: float32 [P, Q]; its rows count alike (no row metric).
        product: where to start.
        column_metric: R, positive semidefinite [Q, Q], or None for the identity.
    """
    rows, weighted, fields = _fields(target, product, column_metric)
    normal = weighted @ rows.T
    signs, scale = product.signs_out.clone(), product.scale_out[:, None]
    own = scale.square() * normal.diagonal()
    threshold = -_LEAST_GAIN * own.mean(1)
    for _ in range(_MAX_FLIPS):
        gain, place = torch.min(scale * signs * fields + own, dim=1)
        moving = torch.nonzero(gain < threshold)[:, 0]
        if moving.numel() == 0:
            break
        place = place[moving]
        change = 2 * scale[moving, 0] * signs[moving, place]
        fields[moving] += change[:, None] * normal[place]
        signs[moving, place] *= -1
    return product._replace(signs_out=signs)


def _fields(target: Tensor, product: Product, column_metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return g [M, Q], g R, and (E R gᵀ) [P, M]; see the head."""
    rows = product.scale_mid[:, None] * product.inner
    weighted = apply_metrics(rows, None, column_metric)
    return rows, weighted, (target - product.dense()) @ weighted.T


def _fit_side(
    target: Tensor, product: Product, row_metric: Tensor | None, column_metric: Tensor | None
) -> Tensor:
    basis = (product.signs_out * product.scale_mid) @ product.inner
    weighted = apply_metrics(basis, None, column_metric)
    if row_metric is None:
        power = (weighted * basis).sum(1)
        # A row that the product cannot reach keeps its scale.
        return torch.where(power > 0, (weighted * target).sum(1) / power, product.scale_out)
    return _fit(
        row_metric * (weighted @ basis.T), (apply_metrics(target, row_metric, None) * weighted).sum(1)
    )


def _fit(normal: Tensor, wanted: Tensor) -> Tensor:
    # The second term is for a product of zeros, whose scales stay zeros.
    normal.diagonal().add_(_JITTER * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny)
    solution: Tensor = torch.linalg.solve_ex(normal, wanted)[0]
    return solution
