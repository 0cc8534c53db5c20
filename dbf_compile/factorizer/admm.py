"""The turns of ADMM: a batch of weighted matrices into products of two factors of signs and scales.

The weighted matrix [P, Q] is approximated by ``leftᵀ · right`` with left [M, P] and right [M, Q], in turns. Each
turn takes one factor, its rows scaled to norm 1 and averaged, as ``basis`` and moves the other once:

    solution = (basis · basisᵀ + (ridge + rho) I)⁻¹ (basis · target + rho (primal − leak · dual))
    point    = relaxation · solution + (1 − relaxation) · primal + leak · dual
    primal   = sign(point) ⊙ rank_one(|point|)
    dual     = point − primal
    basis'   = averaging · basis' + (1 − averaging) · (primal, rows scaled to norm 1)

with basis' what the turn of the other factor will see. While ``progress`` goes from 0 to 1:

    ridge       0.32 → 0.004    geometric     early the basis is about to change: trust it less
    rho         0.16 → 0.95     geometric     the pull towards signs; as it grows, signs freeze
    relaxation  0.75 → 1.45
    leak        0.91 → 0.96                   the dual forgets within some twenty turns
    averaging   −0.1 → 0.55                   early the basis is extrapolated, late it is a mean of its last two or three

Whole metrics have many directions of little weight, which a ridge and a rho of that size would hold still: there both
start at 0.12.

With whole metrics L̃, R̃ (unit diagonals) the solve of a turn becomes

    basis · L̃ · basisᵀ = V μ Vᵀ,  R̃ = U λ Uᵀ
    solution = V [ (Vᵀ (basis · L̃ · target · R̃ + rho (primal − leak · dual)) U) ⊘ (μ λᵀ + ridge + rho) ] Uᵀ

Source: Boža and Macko (arXiv 2505.11076). Same splitting; updates and schedule are our own, found by search on pretrained
weights (``benchmarks/results/factorizer.md`` has the experiments). One solve and one Cholesky factorization a turn instead
of three and two inverses; a single power iteration goes on from the last magnitude.

Shape letters: as in ``admm``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbf_compile.errors import WeightError
from dbf_compile.factorizer.projection import rank_one, signs_of
from dbf_compile.factorizer.refine import Product
from dbf_compile.factorizer.weighted import WeightedWeight, apply_metrics

TINY = 1e-12  # the notebooks' floor on norms
_POWER_ITERATIONS = 1  # a turn; it goes on from the magnitude of the last one


class Step(NamedTuple):
    """The schedule at one moment; see the head of this file."""

    ridge: float
    rho: float
    relaxation: float
    leak: float
    averaging: float


def schedule(iterations: int, whole: bool) -> Iterator[Step]:
    """Yield the constants of every turn; ``whole`` says whether a metric is a matrix."""
    for step in range(iterations):
        progress = step / max(1, iterations - 1)
        yield Step(
            ridge=_geometric(0.12, 0.004, progress) if whole else _geometric(0.32, 0.004, progress**1.6),
            rho=_geometric(0.12 if whole else 0.16, 0.95, progress**1.4),
            relaxation=0.75 + 0.7 * progress,
            leak=0.91 + 0.05 * progress,
            averaging=0.65 * progress - 0.1,
        )


def _geometric(start: float, end: float, progress: float) -> float:
    return start * math.exp(progress * math.log(end / start))


class Turn(NamedTuple):
    """What the turn of a factor [B, M, Q] needs besides the basis [B, M, P].

    Args:
        target: the weighted matrix between the metrics, ``L̃ W̃ R̃`` [B, P, Q].
        basis_metric: L̃ [B, P, P], or None for the identity.
        spectrum: eigenvalues λ [B, 1, Q] and eigenvectors U [B, Q, Q] of R̃, or None for the identity.
    """

    target: Tensor
    basis_metric: Tensor | None
    spectrum: tuple[Tensor, Tensor] | None


class Problem(NamedTuple):
    """A batch of weighted matrices [B, P, Q] with their metrics; arguments as in ``WeightedWeight`` and ``Turn``."""

    matrix: Tensor
    row_metric: Tensor | None
    column_metric: Tensor | None
    row_spectrum: tuple[Tensor, Tensor] | None
    column_spectrum: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(given: Sequence[WeightedWeight]) -> Problem:
        """Return weights of one shape as a batch."""
        kinds = {
            (g.matrix.shape, g.matrix.device, g.row_metric is None, g.column_metric is None) for g in given
        }
        if len(kinds) != 1:
            shapes = sorted({tuple(g.matrix.shape) for g in given})
            raise WeightError(
                f"a batch of {len(given)} weights of shapes {shapes} with {len(kinds)} kinds of importance",
                "weights of one shape and device, with diagonal or with whole moments",
                "factor them one by one",
            )
        rows, columns = _stack([g.row_metric for g in given]), _stack([g.column_metric for g in given])
        matrix = torch.stack([g.matrix for g in given])
        return Problem(matrix, rows, columns, _spectrum(rows), _spectrum(columns))

    def turns(self, matrix: Tensor) -> tuple[Turn, Turn]:
        """Return the turns of the left and of the right factor of ``matrix [B, P, Q]``."""
        target = apply_metrics(matrix, self.row_metric, self.column_metric).contiguous()
        return (
            Turn(target.mT, self.column_metric, self.row_spectrum),
            Turn(target, self.row_metric, self.column_spectrum),
        )


def _stack(metrics: Sequence[Tensor | None]) -> Tensor | None:
    return None if metrics[0] is None else torch.stack([m for m in metrics if m is not None])


def _spectrum(metric: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if metric is None:
        return None
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp_min(0).unsqueeze(-2), vectors


class Factor:
    """A factor on its way, [B, M, Q], with all the memory that its turns need.

    Attributes:
        primal: ``signs ⊙ (rows · columnsᵀ)``.
        dual: what the projections have left over.
        rows: norms of the rows of ``primal`` [B, M].
        columns: the other side of its magnitude [B, Q], of norm 1.
        basis: what the turns of the other factor see.

    Args:
        primal: where to start.
        columns: to be kept, of norm 1, or None to find them.
    """

    def __init__(self, primal: Tensor, columns: Tensor | None) -> None:
        batch, _, size = primal.shape
        self.primal = primal.contiguous()
        self.dual = torch.zeros_like(self.primal)
        self.rows = torch.linalg.vector_norm(self.primal, dim=-1)
        self._fixed = columns is not None
        self.columns = primal.new_full((batch, size), size**-0.5) if columns is None else columns
        self.basis = self.primal / (self.rows[..., None] + TINY)
        # Fresh memory costs more than the element-wise steps that write to it.
        self._wanted, self._point = torch.empty_like(self.primal), torch.empty_like(self.primal)

    def move(self, turn: Turn, basis: Tensor, step: Step) -> None:
        """Take a turn on ``basis [B, M, P]``."""
        wanted, point = self._wanted, self._point
        torch.matmul(basis, turn.target, out=wanted)
        wanted.add_(torch.sub(self.primal, self.dual, alpha=step.leak, out=point), alpha=step.rho)
        _solve(turn, basis, wanted, step, out=point)
        torch.lerp(self.primal, point, step.relaxation, out=point).add_(self.dual, alpha=step.leak)
        magnitude = torch.abs(point, out=wanted)
        if self._fixed:
            self.rows = (magnitude @ self.columns[..., None])[..., 0]
        else:
            self.rows, self.columns = rank_one(magnitude, _POWER_ITERATIONS, self.columns)
        torch.mul(self.rows[..., None], self.columns[..., None, :], out=self.primal).copysign_(point)
        torch.sub(point, self.primal, out=self.dual)
        unit = torch.div(self.primal, self.rows[..., None] + TINY, out=wanted)
        torch.lerp(unit, self.basis, step.averaging, out=self.basis)


def alternate(
    turns: tuple[Turn, Turn],
    mid_features: int,
    kept: tuple[Tensor | None, Tensor | None],
    starts: int,
    generator: torch.Generator,
    iterations: int,
    progress: Callable[[float], object] | None,
) -> list[Product]:
    """Return a product for every matrix of the batch, found by ADMM; its scales are not fitted.

    ``kept`` are columns of the left and the right factor, or None to find them.
    """
    batch, left_size, right_size = turns[1].target.shape
    # Drawn on the CPU, so that all devices start alike. Zeros for the left factor, which moves first, let the whole
    # turn with the signs and the order of its side.
    drawn = torch.randn(
        starts, mid_features, right_size, generator=generator, dtype=torch.float32, device="cpu"
    )
    drawn = drawn.to(turns[1].target.device).repeat(batch // starts, 1, 1)
    right = Factor(drawn, kept[1])
    left = Factor(right.primal.new_zeros(batch, mid_features, left_size), kept[0])
    whole = any(turn.basis_metric is not None for turn in turns)
    for done, step in enumerate(schedule(iterations, whole), start=1):
        left.move(turns[0], right.basis, step)
        right.move(turns[1], left.basis, step)
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


def _solve(turn: Turn, basis: Tensor, wanted: Tensor, step: Step, out: Tensor) -> None:
    """Write to ``out`` the V that solves the normal equations with the right side ``wanted``; see the head."""
    normal = apply_metrics(basis, None, turn.basis_metric) @ basis.mT
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = step.ridge * diagonal.mean(-1)
    if turn.spectrum is None:
        diagonal.add_((ridge + step.rho)[..., None])
        # One product with the inverse takes less time than two triangular solves, and keeps the row-major layout
        # that the element-wise steps after it need. A failure leaves NaN, which is looked for at the end.
        torch.matmul(torch.cholesky_inverse(torch.linalg.cholesky_ex(normal)[0]), wanted, out=out)
        return
    values, vectors = turn.spectrum
    inner_values, inner_vectors = torch.linalg.eigh(normal)
    solution = inner_vectors.mT @ wanted @ vectors
    shift = step.rho + ridge * values.mean((-2, -1))
    solution /= inner_values.clamp_min(0)[..., None] * values + shift[..., None, None]
    torch.matmul(inner_vectors @ solution, vectors.mT, out=out)
