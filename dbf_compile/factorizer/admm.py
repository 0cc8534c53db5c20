"""ADMM iterations: a batch of weighted matrices into products of two factors, each of signs and scales.

The weighted matrix [P, Q] is approximated by ``leftᵀ · right`` with left [M, P] and right [M, Q]. An iteration updates
the left factor and then the right one. An update holds the other factor fixed: its rows, scaled to norm 1 and averaged
over iterations, are the ``basis``.

    anchor   = primal − leak · dual
    solution = (basis · basisᵀ + (ridge + rho) I)⁻¹ (basis · target + rho · anchor)
    point    = relaxation · solution + (1 − relaxation) · primal + leak · dual
    primal   = sign(point) ⊙ rank_one(|point|)
    dual     = point − primal
    basis'   = averaging · basis' + (1 − averaging) · (primal, rows scaled to norm 1)

basis' is the basis of the other factor's next update. The coefficients change while ``progress`` goes from 0 to 1:

    ridge       0.32 → 0.004    geometric     early the basis is about to change: trust it less
    rho         0.16 → 0.95     geometric     the pull towards signs; as it grows, signs freeze
    relaxation  0.75 → 1.45
    leak        0.91 → 0.96                   the dual forgets within some twenty iterations
    averaging   −0.1 → 0.55                   early the basis is extrapolated, late it is a mean of the last two or three

Whole metrics have many directions of little weight, which a ridge and a rho of that size would hold still. With them
both start at 0.12.

With whole metrics L̃, R̃ (unit diagonals) the first line becomes

    basis · L̃ · basisᵀ = V μ Vᵀ,  R̃ = U λ Uᵀ
    solution = V [ (Vᵀ (basis · L̃ · target · R̃ + rho · anchor) U) ⊘ (μ λᵀ + ridge + rho) ] Uᵀ

Without metrics the solution is computed as what it adds to a share of the anchor, in the smaller of the two spaces:

    share = rho / (ridge + rho),  rest = target − share · basisᵀ · anchor
    solution = share · anchor + basis · (basisᵀ · basis + (ridge + rho) I)⁻¹ · rest        M > P
             = share · anchor + (basis · basisᵀ + (ridge + rho) I)⁻¹ · basis · rest        M ≤ P

Towards the end ``rest`` is the error of the factors, and small. So what is multiplied may be rounded to bfloat16: the
rounding changes the step, not what it leads to. Rounding what the first line multiplies raised errors by up to 2.2 times.

Source: Boža and Macko (arXiv 2505.11076). The splitting is theirs; updates and schedule are our own, found by search on
pretrained weights (``benchmarks/results/factorizer.md`` has the experiments). An update takes one solve and one Cholesky
factorization instead of three and two inverses; a single power iteration starts from the last magnitude.

Shape letters: B matrices of the batch, P and Q their sides, M mid_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.projection import TINY, rank_one, signs_of
from dbf_compile.factorizer.refine import Product
from dbf_compile.factorizer.weighted import WeightedWeight, apply_metrics
from dbf_compile.machine import multiplies_bfloat16

_POWER_ITERATIONS = 1  # in an update; they start from the magnitude of the last update
_NARROW_PRODUCTS = 2**25  # multiplications of a product, from which rounding to bfloat16 is worth its time
_PANEL = 256  # rows of a symmetric product that are computed at once


class Coefficients(NamedTuple):
    """The coefficients of one iteration; the head of this file says where they stand."""

    ridge: float
    rho: float
    relaxation: float
    leak: float
    averaging: float


def schedule(iterations: int, whole: bool) -> Iterator[Coefficients]:
    """Yield the coefficients of every iteration; ``whole`` says whether a metric is a matrix."""
    for iteration in range(iterations):
        progress = iteration / max(1, iterations - 1)
        yield Coefficients(
            ridge=_geometric(0.12, 0.004, progress) if whole else _geometric(0.32, 0.004, progress**1.6),
            rho=_geometric(0.12 if whole else 0.16, 0.95, progress**1.4),
            relaxation=0.75 + 0.7 * progress,
            leak=0.91 + 0.05 * progress,
            averaging=0.65 * progress - 0.1,
        )


def _geometric(start: float, end: float, progress: float) -> float:
    return start * math.exp(progress * math.log(end / start))


class Subproblem(NamedTuple):
    """What the updates of one factor [B, M, Q] need besides the basis [B, M, P].

    Args:
        target: ``L̃ · W̃ · R̃`` [B, P, Q], the weighted matrix between the metrics.
        basis_metric: L̃ [B, P, P], or None for the identity.
        spectrum: eigenvalues λ [B, 1, Q] and eigenvectors U [B, Q, Q] of R̃, or None for the identity.
    """

    target: Tensor
    basis_metric: Tensor | None
    spectrum: tuple[Tensor, Tensor] | None

    @property
    def has_metric(self) -> bool:
        """Whether a metric is no identity."""
        return self.basis_metric is not None or self.spectrum is not None


class Problem(NamedTuple):
    """A batch of weighted matrices with their metrics.

    Args:
        matrix: W̃ [B, P, Q].
        row_metric: L̃ [B, P, P], or None for the identity.
        column_metric: R̃ [B, Q, Q], or None for the identity.
        row_spectrum: eigenvalues [B, 1, P] and eigenvectors [B, P, P] of L̃, or None.
        column_spectrum: eigenvalues [B, 1, Q] and eigenvectors [B, Q, Q] of R̃, or None.
    """

    matrix: Tensor
    row_metric: Tensor | None
    column_metric: Tensor | None
    row_spectrum: tuple[Tensor, Tensor] | None
    column_spectrum: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(weights: Sequence[WeightedWeight]) -> Problem:
        """Return weights as a batch.

        Raises:
            WeightError: there is no weight, or shapes, devices or kinds of importance differ.
        """
        kinds = {
            (w.matrix.shape, w.matrix.device, w.row_metric is None, w.column_metric is None) for w in weights
        }
        if len(kinds) != 1:
            shapes = sorted({tuple(weight.matrix.shape) for weight in weights})
            raise WeightError(
                f"a batch of {len(weights)} weights of shapes {shapes} with {len(kinds)} kinds of importance",
                "weights of one shape and device, with diagonal or with whole moments",
                "factor them one by one",
            )
        rows, columns = _stack([w.row_metric for w in weights]), _stack([w.column_metric for w in weights])
        matrix = torch.stack([weight.matrix for weight in weights])
        return Problem(matrix, rows, columns, _spectrum(rows), _spectrum(columns))

    def subproblems(self, matrix: Tensor) -> tuple[Subproblem, Subproblem]:
        """Return the subproblems of the left and of the right factor of ``matrix [B, P, Q]``."""
        target = apply_metrics(matrix, self.row_metric, self.column_metric).contiguous()
        return (
            Subproblem(target.mT, self.column_metric, self.row_spectrum),
            Subproblem(target, self.row_metric, self.column_spectrum),
        )


def _stack(metrics: Sequence[Tensor | None]) -> Tensor | None:
    return None if metrics[0] is None else torch.stack([m for m in metrics if m is not None])


def _spectrum(metric: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if metric is None:
        return None
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp_min(0).unsqueeze(-2), vectors


class Factor:
    """The state of one factor [B, M, Q] between its updates.

    Attributes:
        primal: ``signs ⊙ (rows · columnsᵀ)`` [B, M, Q].
        dual: what the projections have left over [B, M, Q].
        rows: norms of the rows of ``primal`` [B, M].
        columns: the other side of its magnitude [B, Q], of norm 1.
        basis: what the updates of the other factor see [B, M, Q].

    Args:
        primal: the start.
        columns: columns to keep, of norm 1; None to fit them.
    """

    def __init__(self, primal: Tensor, columns: Tensor | None) -> None:
        batch, _, size = primal.shape
        self.primal = primal.contiguous()
        self.dual = torch.zeros_like(self.primal)
        self.rows = torch.linalg.vector_norm(self.primal, dim=-1)
        self._fixed = columns is not None
        self.columns = primal.new_full((batch, size), size**-0.5) if columns is None else columns
        self.basis = self.primal / (self.rows[..., None] + TINY)
        # Buffers: fresh memory costs more than the element-wise steps that write to it.
        self._spare, self._point = torch.empty_like(self.primal), torch.empty_like(self.primal)

    def update(self, subproblem: Subproblem, basis: Tensor, coefficients: Coefficients) -> None:
        """Update this factor, with the other one fixed as ``basis`` [B, M, P]."""
        point, relaxation, leak = self._point, coefficients.relaxation, coefficients.leak
        anchor = torch.sub(self.primal, self.dual, alpha=leak, out=point)
        if subproblem.has_metric:
            torch.matmul(basis, subproblem.target, out=self._spare).add_(anchor, alpha=coefficients.rho)
            _solve(subproblem, basis, self._spare, coefficients, out=point)
            torch.lerp(self.primal, point, relaxation, out=point).add_(self.dual, alpha=leak)
        else:
            share, step = _step(subproblem.target, basis, anchor, coefficients)
            torch.mul(self.primal, 1 - relaxation + relaxation * share, out=point)
            point.addcmul_(self.dual, leak - leak * relaxation * share).add_(step, alpha=relaxation)
        magnitude = torch.abs(point, out=self._spare)
        if self._fixed:
            self.rows = (magnitude @ self.columns[..., None])[..., 0]
        else:
            self.rows, self.columns = rank_one(magnitude, _POWER_ITERATIONS, self.columns)
        torch.mul(self.rows[..., None], self.columns[..., None, :], out=self.primal).copysign_(point)
        torch.sub(point, self.primal, out=self.dual)
        unit = torch.div(self.primal, self.rows[..., None] + TINY, out=self._spare)
        torch.lerp(unit, self.basis, coefficients.averaging, out=self.basis)


def run_admm(
    subproblems: tuple[Subproblem, Subproblem],
    mid_features: int,
    columns: tuple[Tensor | None, Tensor | None],
    starts: int,
    generator: torch.Generator,
    iterations: int,
    progress: Callable[[float], object] | None,
) -> list[Product]:
    """Return a product for every matrix of the batch; its scales are not fitted yet.

    Args:
        subproblems: of the left and of the right factor.
        mid_features: M.
        columns: columns of the left [B, P] and of the right factor [B, Q] to keep; None to fit them.
        starts: random starts of every weight; they lie next to each other in the batch.
        generator: on the CPU; draws the starts.
        iterations: number of iterations.
        progress: called after every iteration with the fraction done, 0 to 1.

    Raises:
        WeightError: the normal equations are not positive definite, as with TF32 products.
    """
    batch, left_size, right_size = subproblems[1].target.shape
    # Drawn on the CPU, so that all devices start alike. The left factor is updated first. It starts from zeros, so that
    # an iteration commutes with sign flips and permutations of its side.
    start = torch.randn(
        starts, mid_features, right_size, generator=generator, dtype=torch.float32, device="cpu"
    )
    right = Factor(start.to(subproblems[1].target.device).repeat(batch // starts, 1, 1), columns[1])
    left = Factor(right.primal.new_zeros(batch, mid_features, left_size), columns[0])
    whole = any(subproblem.basis_metric is not None for subproblem in subproblems)
    for done, coefficients in enumerate(schedule(iterations, whole), start=1):
        left.update(subproblems[0], right.basis, coefficients)
        right.update(subproblems[1], left.basis, coefficients)
        if progress is not None:
            progress(done / iterations)
    if not bool(torch.isfinite(right.rows).all()):
        raise WeightError(
            "normal equations that are not positive definite",
            "float32 products of full precision",
            "turn TF32 off while factoring",
        )
    return [
        Product(
            signs_of(left.primal[index]).T,
            signs_of(right.primal[index]),
            left.columns[index],
            right.rows[index],
            right.columns[index],
        )
        for index in range(batch)
    ]


def _step(target: Tensor, basis: Tensor, anchor: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Return the share [B, 1, 1] of the anchor in the solution, and what the solution adds to it [B, M, Q].

    The head of this file has the formulas.

    Args:
        target: [B, P, Q].
        basis: [B, M, P].
        anchor: [B, M, Q].
        coefficients: of the iteration.
    """
    mid_features = basis.shape[-2]
    narrow = mid_features * target.shape[-2] * target.shape[-1] >= _NARROW_PRODUCTS
    dtype = torch.bfloat16 if narrow and multiplies_bfloat16(basis.device.type) else torch.float32
    rounded = basis.to(dtype)
    wide = mid_features > target.shape[-2]
    # Where it is wide, in float32: an entry may be a thousand times the shift.
    operand = rounded.float().mT if wide else rounded
    normal = _gram(operand)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    shift = coefficients.ridge * diagonal.sum(-1) / mid_features + coefficients.rho
    share = (coefficients.rho / shift)[..., None, None]
    rest = target - share * _product(rounded.mT, anchor.to(dtype))
    inverse = _inverse(normal, shift)
    if wide:
        return share, _product((operand.mT @ inverse).to(dtype), rest.to(dtype))
    return share, inverse @ _product(rounded, rest.to(dtype)).float()


def _gram(rows: Tensor) -> Tensor:
    """Return the lower triangle of ``rows · rowsᵀ`` [B, R, R] in float32; above it is anything."""
    count = rows.shape[-2]
    gram = rows.new_zeros(*rows.shape[:-1], count, dtype=torch.float32)
    for start in range(0, count, _PANEL):
        end = min(count, start + _PANEL)
        gram[..., start:end, :end] = _product(rows[..., start:end, :], rows[..., :end, :].mT)
    return gram


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left · right`` of two batches. A batch of one is multiplied as a matrix, whose transpose is not copied."""
    return (left[0] @ right[0])[None] if len(left) == 1 else left @ right


def _inverse(normal: Tensor, shift: Tensor) -> Tensor:
    """Return ``(normal + shift I)⁻¹`` of lower triangles [B, M, M]. A failure leaves NaN, which run_admm reports.

    One product with the inverse takes less time than two triangular solves, and keeps the row-major layout that the
    element-wise steps after it need.
    """
    normal.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(normal)[0])


def _solve(
    subproblem: Subproblem, basis: Tensor, right_side: Tensor, coefficients: Coefficients, out: Tensor
) -> None:
    """Write the solution of the normal equations to ``out`` [B, M, Q]; the head of this file has the formula."""
    normal = apply_metrics(basis, None, subproblem.basis_metric) @ basis.mT
    ridge = coefficients.ridge * normal.diagonal(dim1=-2, dim2=-1).mean(-1)
    if subproblem.spectrum is None:
        torch.matmul(_inverse(normal, ridge + coefficients.rho), right_side, out=out)
        return
    values, vectors = subproblem.spectrum
    inner_values, inner_vectors = torch.linalg.eigh(normal)
    solution = inner_vectors.mT @ right_side @ vectors
    shift = coefficients.rho + ridge * values.mean((-2, -1))
    solution /= inner_values.clamp_min(0)[..., None] * values + shift[..., None, None]
    torch.matmul(inner_vectors @ solution, vectors.mT, out=out)
