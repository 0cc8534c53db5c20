"""Refinement of a factorization: least squares for the scales, coordinate descent for the signs.

    J = tr(L · E · R · Eᵀ)        E [P, Q] = target − diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

``target`` is the weighted matrix of :class:`~dbf_compile.factorizer.weighted.WeightedWeight`, L [P, P] and
R [Q, Q] its metrics; without them J is the squared Frobenius norm of E. Every step minimizes J exactly over some of the
unknowns with all others fixed, so that J never rises.

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
# A flip must gain more than the rounding error of its float32 sums, or rows would flip to and fro.
_LEAST_GAIN = 1e-6
_MAX_FLIPS = 64  # flips of a row in one pass; few rows need more than a dozen


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
        """The same product with scales of 0 or more; signs take over what was negative."""
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
    """Return J of ``product`` for ``target`` [P, Q] and metrics L [P, P], R [Q, Q]; None is the identity."""
    return squared_norm(target - product.dense(), row_metric, column_metric)


def refine(
    target: Tensor,
    product: Product,
    row_metric: Tensor | None = None,
    column_metric: Tensor | None = None,
    sweeps: int = 2,
) -> Product:
    """Return a product with a J at most that of ``product``.

    A sweep flips signs by coordinate descent, then refits the scales by least squares. It leaves the signs of a side
    as they are where a metric couples the rows of that side.

    Args:
        target: float32 [P, Q].
        product: the start.
        row_metric: L, positive semidefinite [P, P], or None for the identity.
        column_metric: R, positive semidefinite [Q, Q], or None for the identity.
        sweeps: number of sweeps; 0 returns ``product``.
    """
    best, error = product, squared_error(target, product, row_metric, column_metric)
    for _ in range(sweeps):
        trial = best
        if row_metric is None:
            trial = flip_signs(target, trial, column_metric)
        if column_metric is None:
            trial = flip_signs(target.T, trial.transposed, row_metric).transposed
        trial = refit_scales(target, trial, row_metric, column_metric)
        trial_error = squared_error(target, trial, row_metric, column_metric)
        if not trial_error < error:  # only rounding is left, or the normal equations were singular
            break
        best, error = trial, trial_error
    return best


def refit_scales(
    target: Tensor, product: Product, row_metric: Tensor | None = None, column_metric: Tensor | None = None
) -> Product:
    """Return ``product`` with ``scale_mid``, ``scale_out`` and ``scale_in`` refitted one after the other; signs stay.

    ``[(Fᵀ L F) ⊙ (G R Gᵀ)] scale_mid = diag(Fᵀ L W R Gᵀ)``     F = outer [P, M], G = inner [M, Q]
    ``[L ⊙ (H R Hᵀ)] scale_out = diag(L W R Hᵀ)``               H = signs_out · diag(scale_mid) · inner [P, Q]

    ``scale_in`` is fitted like ``scale_out``, on the transposed product. Arguments as for :func:`refine`.
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
    """Return the change of J [P, M] when one sign of ``signs_out`` is flipped and all else stays.

    Arguments as for :func:`flip_signs`. For its result no change is negative beyond rounding.
    """
    rows, weighted, fields = _fields(target, product, column_metric)
    scale = product.scale_out[:, None]
    return 4 * scale * (product.signs_out * fields + scale * (weighted * rows).sum(1))


def flip_signs(target: Tensor, product: Product, column_metric: Tensor | None = None) -> Product:
    """Return ``product`` after coordinate descent over ``signs_out``.

    In each row the sign whose flip lowers J most is flipped, until no flip of that row lowers J. Rows are independent,
    so that all are flipped at once.

    Args:
        target: float32 [P, Q]; its rows are not coupled (no row metric).
        product: the start.
        column_metric: R, positive semidefinite [Q, Q], or None for the identity.
    """
    rows, weighted, fields = _fields(target, product, column_metric)
    normal = weighted @ rows.T
    result = product.signs_out.clone()
    # Rows that no flip improves are done. The others, fewer and fewer, are kept beside each other.
    open_rows = torch.arange(len(result), device=result.device)
    signs, scale = result.clone(), product.scale_out[:, None]
    own = scale.square() * normal.diagonal()
    threshold = -_LEAST_GAIN * own.mean(1)
    for _ in range(_MAX_FLIPS):
        change, column = torch.min(scale * signs * fields + own, dim=1)  # a quarter of the change of J
        going_on = torch.nonzero(change < threshold)[:, 0]
        if going_on.numel() < open_rows.numel():
            result[open_rows] = signs
            open_rows, signs, scale, own, threshold, fields, column = (
                item[going_on] for item in (open_rows, signs, scale, own, threshold, fields, column)
            )
        if open_rows.numel() == 0:
            break
        place = torch.arange(len(open_rows), device=result.device)
        fields += (2 * scale[:, 0] * signs[place, column])[:, None] * normal[column]
        signs[place, column] *= -1
    result[open_rows] = signs
    return product._replace(signs_out=result)


def _fields(target: Tensor, product: Product, column_metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return g [M, Q], g R [M, Q] and E R gᵀ [P, M]; the head of this file defines them."""
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
        # A row of zeros keeps its scale.
        return torch.where(power > 0, (weighted * target).sum(1) / power, product.scale_out)
    return _fit(
        row_metric * (weighted @ basis.T), (apply_metrics(target, row_metric, None) * weighted).sum(1)
    )


def _fit(normal: Tensor, right_side: Tensor) -> Tensor:
    # The second term is for a product of zeros, whose scales stay zeros.
    normal.diagonal().add_(_JITTER * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny)
    solution: Tensor = torch.linalg.solve_ex(normal, right_side)[0]
    return solution
