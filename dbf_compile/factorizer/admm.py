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
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.projection import TINY, signs_of
from dbf_compile.factorizer.refine import Product
from dbf_compile.factorizer.weighted import WeightedWeight, apply_metrics
from dbf_compile.kernels.factor_update import cpu_kernel, reference
from dbf_compile.machine import multiplies_bfloat16

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
        target: ``(L̃ · W̃ · R̃)ᵀ`` [B, Q, P], the weighted matrix between the metrics.
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
            Subproblem(target, self.column_metric, self.row_spectrum),
            Subproblem(target.mT.contiguous(), self.row_metric, self.column_spectrum),
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
        point: what was projected last [B, M, Q]; its signs are those of the factor.
        rows: norms of the rows of the projection [B, M].
        columns: the other side of its magnitude [B, Q], of norm 1.
        basis: what the updates of the other factor see [B, M, Q].
        rounded: the basis in ``dtype``.

    Args:
        point: the start.
        columns: columns to keep, of norm 1; None to fit them.
        dtype: of what is multiplied, float32 or bfloat16.
    """

    def __init__(self, point: Tensor, columns: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        batch, _, size = point.shape
        self.point = point.contiguous()
        self._keeps_columns = columns is not None
        self.columns = point.new_full((batch, size), size**-0.5) if columns is None else columns.contiguous()
        self.rows = (self.point.abs() @ self.columns[..., None])[..., 0]
        self.basis = self.point / (torch.linalg.vector_norm(self.point, dim=-1, keepdim=True) + TINY)
        self.rounded = self.basis.to(dtype)
        self.buffers = Buffers()
        self._steps: ModuleType = cpu_kernel if cpu_kernel.takes(self.point) else reference

    def update(self, subproblem: Subproblem, basis: Tensor, coefficients: Coefficients) -> None:
        """Update this factor, with the other one fixed as its rounded ``basis`` [B, M, P]."""
        share, step = (_solution if subproblem.has_metric else _step)(self, subproblem, basis, coefficients)
        state = self.point, self.rows, self.columns
        relaxation, leak = coefficients.relaxation, coefficients.leak
        self._steps.advance(*state, step, share, relaxation, leak, self._keeps_columns)
        self._steps.average(*state, coefficients.averaging, self.basis)
        if self.rounded is not self.basis:
            self.rounded.copy_(self.basis)

    def anchor(self, leak: float) -> Tensor:
        """Return ``(primal − leak · dual)ᵀ`` [B, Q, M] in ``dtype``."""
        out = self.buffers("anchor", self.point.mT.shape, self.rounded.dtype, self.point)
        self._steps.anchor(self.point, self.rows, self.columns, leak, out)
        return out

    def rest(self, target: Tensor, product: Tensor, share: Tensor) -> Tensor:
        """Return ``target − share · product`` [B, Q, P], which takes the place of ``product``."""
        self._steps.rest(target, product, share)
        return product


class Buffers:
    """Memory that is used again: fresh memory costs more than the element-wise steps that write to it."""

    def __init__(self) -> None:
        self._by_name: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype, beside: Tensor) -> Tensor:
        """Return the buffer ``name`` on the device of ``beside``."""
        if name not in self._by_name:
            self._by_name[name] = beside.new_empty(shape, dtype=dtype)
        return self._by_name[name]


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
    batch, left_size, right_size = subproblems[0].target.shape
    # Drawn on the CPU, so that all devices start alike. The left factor is updated first. It starts from zeros, so that
    # an iteration commutes with sign flips and permutations of its side.
    start = torch.randn(
        starts, mid_features, right_size, generator=generator, dtype=torch.float32, device="cpu"
    )
    device = subproblems[0].target.device
    has_metric = any(subproblem.has_metric for subproblem in subproblems)
    dtype = torch.float32 if has_metric else product_dtype(mid_features, (left_size, right_size), device)
    right = Factor(start.to(device).repeat(batch // starts, 1, 1), columns[1], dtype)
    left = Factor(right.point.new_zeros(batch, mid_features, left_size), columns[0], dtype)
    whole = any(subproblem.basis_metric is not None for subproblem in subproblems)
    for done, coefficients in enumerate(schedule(iterations, whole), start=1):
        left.update(subproblems[0], right.rounded, coefficients)
        right.update(subproblems[1], left.rounded, coefficients)
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
            signs_of(left.point[index]).T,
            signs_of(right.point[index]),
            left.columns[index],
            right.rows[index],
            right.columns[index],
        )
        for index in range(batch)
    ]


def product_dtype(mid_features: int, sizes: tuple[int, int], device: torch.device) -> torch.dtype:
    """Return the dtype of what the updates of a problem [P, Q] without metrics multiply."""
    narrow = mid_features * math.prod(sizes) >= _NARROW_PRODUCTS and multiplies_bfloat16(device.type)
    return torch.bfloat16 if narrow else torch.float32


def _step(
    factor: Factor, subproblem: Subproblem, basis: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor]:
    """Return the share [B] of the anchor in the solution, and what the solution adds to it [B, M, Q].

    The head of this file has the formulas for a subproblem without metrics; ``basis`` is [B, M, P].
    """
    target, buffers = subproblem.target, factor.buffers
    mid_features, sizes = basis.shape[-2], factor.point.shape
    wide = mid_features > target.shape[-1]
    # Where it is wide, in float32: an entry may be a thousand times the shift.
    operand = buffers("operand", basis.shape, torch.float32, basis).copy_(basis).mT if wide else basis
    normal = _gram(operand, buffers)
    shift = coefficients.ridge * normal.diagonal(dim1=-2, dim2=-1).sum(-1) / mid_features + coefficients.rho
    share = coefficients.rho / shift
    # Products with a transposed left side take twice as long in bfloat16: the anchor and what is made of it lie transposed.
    anchor = factor.anchor(coefficients.leak)
    product = _product(anchor, basis, buffers("rest", target.shape, basis.dtype, basis))
    rest = factor.rest(target, product, share).mT
    inverse = _inverse(normal, shift, buffers)
    if wide:
        whole = _product(operand.mT, inverse, buffers("whole", basis.shape, torch.float32, basis))
        solver = buffers("solver", basis.shape, basis.dtype, basis).copy_(whole)
        return share, _product(solver, rest, buffers("step", sizes, basis.dtype, basis))
    solver = buffers("solver", inverse.shape, basis.dtype, basis).copy_(inverse)
    projected = _product(basis, rest, anchor.view(sizes))  # the anchor is read already
    return share, _product(solver, projected, buffers("step", sizes, basis.dtype, basis))


def _gram(rows: Tensor, buffers: Buffers) -> Tensor:
    """Return ``rows · rowsᵀ`` [B, R, R] in float32; above the diagonal it may be anything."""
    count = rows.shape[-2]
    shape = (*rows.shape[:-1], count)
    if rows.dtype == torch.bfloat16:  # the product takes less time than parts of it would
        return buffers("gram", shape, torch.float32, rows).copy_(
            _product(rows, rows.mT, buffers("solver", shape, rows.dtype, rows))
        )
    gram = buffers("gram", shape, torch.float32, rows)
    for start in range(0, count, _PANEL):
        end = min(count, start + _PANEL)
        gram[..., start:end, :end] = _product(rows[..., start:end, :], rows[..., :end, :].mT)
    return gram


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``left · right`` of two batches. A batch of one is multiplied as a matrix, whose transpose is not copied."""
    if len(left) > 1:
        return torch.bmm(left, right, out=out)
    return torch.mm(left[0], right[0], out=None if out is None else out[0])[None]


def _inverse(normal: Tensor, shift: Tensor, buffers: Buffers) -> Tensor:
    """Return ``(normal + shift I)⁻¹`` of lower triangles [B, M, M]. A failure leaves NaN, which run_admm reports.

    One product with the inverse takes less time than two triangular solves, and keeps the row-major layout that the
    element-wise steps after it need.
    """
    normal.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    # Column by column, as LAPACK has matrices: nothing is transposed.
    lower, inverse = (buffers(name, normal.shape, torch.float32, normal).mT for name in ("lower", "inverse"))
    torch.linalg.cholesky_ex(normal, out=(lower, torch.empty_like(shift, dtype=torch.int32)))
    return torch.cholesky_inverse(lower, out=inverse).mT  # it is symmetric


def _solution(
    factor: Factor, subproblem: Subproblem, basis: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor]:
    """Return zeros [B] and the solution [B, M, Q]; arguments as of :func:`_step`, with a metric."""
    anchor = factor.anchor(coefficients.leak).mT
    right_side = torch.baddbmm(anchor, basis, subproblem.target.mT, beta=coefficients.rho)
    return anchor.new_zeros(len(anchor)), _solve(subproblem, basis, right_side, coefficients)


def _solve(subproblem: Subproblem, basis: Tensor, right_side: Tensor, coefficients: Coefficients) -> Tensor:
    """Return the solution of the normal equations [B, M, Q]; the head of this file has the formula."""
    normal = apply_metrics(basis, None, subproblem.basis_metric) @ basis.mT
    ridge = coefficients.ridge * normal.diagonal(dim1=-2, dim2=-1).mean(-1)
    if subproblem.spectrum is None:
        return _inverse(normal, ridge + coefficients.rho, Buffers()) @ right_side
    values, vectors = subproblem.spectrum
    inner_values, inner_vectors = torch.linalg.eigh(normal)
    solution = inner_vectors.mT @ right_side @ vectors
    shift = coefficients.rho + ridge * values.mean((-2, -1))
    solution /= inner_values.clamp_min(0)[..., None] * values + shift[..., None, None]
    result: Tensor = inner_vectors @ solution @ vectors.mT
    return result
