"""ADMM for one weight: a dense matrix into double binary factors, weighted by importance.

    min  tr(L · E · R · Eᵀ)            E = W − Ŵ;  L and R as in ``importance``, diagonal or whole
    Ŵ = diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

Source: Boža and Macko, "Addition is almost all you need: Compressing neural networks with double binary
factorization" (arXiv 2505.11076). Same splitting; updates and schedule are our own, found by search on pretrained
weights (``benchmarks/results/factorizer.md`` has the experiments).

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

Above two bits the middle dimension is split: the first part is found as above, the next ones approximate what it
leaves, with its outer and inner scales kept. Errors of parts multiply, so that 2 + 2 bits come near the square of the
error of 2. A single search over all of it falls behind that, presumably because with M > P many solutions fit the matrix
equally well before they are rounded, and the pull towards signs has little to choose by.

Differs from the paper, besides: one solve and one Cholesky factorization a turn instead of three and two inverses;
a single power iteration goes on from the last magnitude; the result is refined (``refine``); the size of
the weight is spread evenly over the three scales, which are rounded to float16.

Shape letters: K in_features, N out_features, M mid_features (R elsewhere, where no curvature has that name);
P, Q are N, K, or K, N where N ≥ K: the factor on the short side moves first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dbf_compile.compression.importance import Importance, WeightedWeight, between, squared_norm
from dbf_compile.compression.projection import half_scales, rank_one, signs_of
from dbf_compile.compression.refine import Product, refine, refit_scales, squared_error
from dbf_compile.errors import OptionError, WeightError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.options import PRESETS
from dbf_compile.signs import pack_signs

_TINY = 1e-12  # the notebooks' floor on norms
_BITS_OF_A_PART = 2.1  # sign bits per weight; above, two parts are better than one
_FEW_SIGNS = 2**14  # factors of a quarter of them get four starts
_POWER_ITERATIONS = 1  # a turn; it goes on from the magnitude of the last one


@dataclass(frozen=True, kw_only=True)
class FactorizerConfig:
    """Settings of the factorizer.

    Args:
        iterations: turns of each factor; ``PRESETS`` has usual numbers. The schedule is stretched over them:
            more give smaller errors, about 2 % for every doubling. Above two bits, half as many again.
        sweeps: passes of refinement at the end.
        seed: of the random starts, up to four where a weight is small; equal seeds give equal factors.

    Raises:
        OptionError: a value is of the wrong type or range.
    """

    iterations: int = PRESETS["balanced"]
    sweeps: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("iterations", 1), ("sweeps", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
                raise OptionError(
                    f"{name}={value!r}", f"a whole number of {low} or more", f"leave {name} at its default"
                )


class HasDense(Protocol):
    """Anything that stands for a dense weight: ``DoubleBinaryFactors``, ``OneBitFactors``."""

    def dense(self, dtype: torch.dtype = ...) -> Tensor:
        """Return the weight [N, K] in ``dtype``."""


def factorize(
    weight: Tensor,
    mid_features: int,
    importance: Importance | None = None,
    config: FactorizerConfig = FactorizerConfig(),
    *,
    progress: Callable[[float], object] | None = None,
) -> DoubleBinaryFactors:
    """Factor a dense weight: ``weight [N, K] ≈ factors.dense()``.

    Repeatable bit for bit on one machine at one number of threads; another number of threads changes the
    order of float32 sums, and with it single signs. Neither reads nor moves the global random state.

    Args:
        weight: floating point [N, K], any device; computed in float32 on that device, in about 16 times the
            memory of the weight in float32 at 2 bits.
        mid_features: 1 or more.
        importance: second moments of the layer, or None to weigh all entries alike.
        config: settings.
        progress: called after every iteration with the fraction done, 0 to 1.

    Returns:
        Factors on the device of the weight, scales in float16 with equal root mean squares.

    Raises:
        WeightError: weight, importance or ``mid_features`` cannot be factored, or the scales do not fit
        float16.
    """
    return factorize_batch([weight], mid_features, [importance], config, progress=progress)[0]


@torch.no_grad()
def factorize_batch(
    weights: Sequence[Tensor],
    mid_features: int,
    importances: Sequence[Importance | None] | None = None,
    config: FactorizerConfig = FactorizerConfig(),
    *,
    progress: Callable[[float], object] | None = None,
) -> list[DoubleBinaryFactors]:
    """Factor weights of one shape together, which keeps a GPU busy where each is small.

    Args:
        weights: floating point [N, K], all of one shape on one device.
        mid_features: 1 or more.
        importances: of each weight, or None for none; all diagonal or all whole on either side.
        config: settings; every weight starts from the same random numbers.
        progress: called after every iteration with the fraction done, 0 to 1.

    Returns:
        The factors of each weight, as :func:`factorize` would make them up to the order of float32 sums.

    Raises:
        WeightError: as for :func:`factorize`, or the weights cannot be put into one batch.
    """
    if not isinstance(mid_features, int) or isinstance(mid_features, bool) or mid_features < 1:
        raise WeightError(
            f"mid_features={mid_features!r}",
            "a whole number of 1 or more",
            "give the layer more bits per weight",
        )
    importances = [None] * len(weights) if importances is None else importances
    # Autocast would turn the products below into bfloat16.
    device_type = weights[0].device.type if len(weights) and isinstance(weights[0], Tensor) else "cpu"
    with torch.autocast(device_type, enabled=False):
        given = [WeightedWeight.of(*pair) for pair in zip(weights, importances, strict=True)]
        tall = all(item.matrix.shape[0] >= item.matrix.shape[1] for item in given)
        if tall:
            given = [item.transposed for item in given]
        made = []
        problem = _Problem.of(given)
        starts = _starts(mid_features * sum(problem.matrix.shape[1:]))
        if starts > 1:
            problem = _Problem.of([item for item in given for _ in range(starts)])
        tried = _in_parts(problem, mid_features, config, starts, progress)
        for index, item in enumerate(given):
            product = _best(item, tried[index * starts : (index + 1) * starts])
            product = refine(item.matrix, product, item.row_metric, item.column_metric, config.sweeps)
            product = product._replace(
                scale_out=product.scale_out / item.rows, scale_in=product.scale_in / item.columns
            )
            if tall:
                product = product.transposed
            scales = half_scales(item.unit, product.scale_in, product.scale_mid, product.scale_out)
            made.append(
                DoubleBinaryFactors(pack_signs(product.signs_in), pack_signs(product.signs_out), *scales)
            )
        return made


@torch.no_grad()
def weighted_error(
    weight: Tensor, approximation: Tensor | HasDense, importance: Importance | None = None
) -> float:
    """Return the relative error: ``tr(L E R Eᵀ) / tr(L W R Wᵀ)``, with diagonals the relative squared error.

    1 is the error of zeros. For a weight of zeros it is 0 where the approximation is zero as well, else
    infinite.

    Args:
        weight: floating point [N, K].
        approximation: Ŵ, a matrix [N, K] or factors that have ``dense``.
        importance: L and R; None for the plain Frobenius norm.

    Raises:
        WeightError: the weight or its importance is not valid, or the approximation has another shape.
    """
    given = WeightedWeight.of(weight, importance)
    dense = approximation if isinstance(approximation, Tensor) else approximation.dense(torch.float64)
    if dense.shape != weight.shape:
        raise WeightError(
            f"an approximation of shape {tuple(dense.shape)} for a weight of shape {tuple(weight.shape)}",
            "equal shapes",
            "compare factors with the weight they were made from",
        )
    peak = weight.abs().amax().double()
    if float(peak) == 0.0:
        return 0.0 if not bool(dense.any()) else float("inf")

    metrics = [
        None if metric is None else metric.double() for metric in (given.row_metric, given.column_metric)
    ]

    def size(matrix: Tensor) -> float:
        return squared_norm(given.rows.double()[:, None] * matrix * given.columns.double(), *metrics)

    exact = weight.double() / peak
    return size(exact - dense.to(weight.device).double() / peak) / size(exact)


class _Step(NamedTuple):
    """The schedule at one moment; see the head of this file."""

    ridge: float
    rho: float
    relaxation: float
    leak: float
    averaging: float


def _schedule(iterations: int, whole: bool) -> Iterator[_Step]:
    for step in range(iterations):
        progress = step / max(1, iterations - 1)
        yield _Step(
            ridge=_geometric(0.12, 0.004, progress) if whole else _geometric(0.32, 0.004, progress**1.6),
            rho=_geometric(0.12 if whole else 0.16, 0.95, progress**1.4),
            relaxation=0.75 + 0.7 * progress,
            leak=0.91 + 0.05 * progress,
            averaging=0.65 * progress - 0.1,
        )


def _geometric(start: float, end: float, progress: float) -> float:
    return start * math.exp(progress * math.log(end / start))


class _Turn(NamedTuple):
    """What the turn of a factor [B, M, Q] needs besides the basis [B, M, P].

    Args:
        target: the weighted matrix between the metrics, ``L̃ W̃ R̃`` [B, P, Q].
        basis_metric: L̃ [B, P, P], or None for the identity.
        spectrum: eigenvalues λ [B, 1, Q] and eigenvectors U [B, Q, Q] of R̃, or None for the identity.
    """

    target: Tensor
    basis_metric: Tensor | None
    spectrum: tuple[Tensor, Tensor] | None


class _Problem(NamedTuple):
    """A batch of weighted matrices [B, P, Q] with their metrics; arguments as in ``WeightedWeight`` and ``_Turn``."""

    matrix: Tensor
    row_metric: Tensor | None
    column_metric: Tensor | None
    row_spectrum: tuple[Tensor, Tensor] | None
    column_spectrum: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(given: Sequence[WeightedWeight]) -> _Problem:
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
        return _Problem(matrix, rows, columns, _spectrum(rows), _spectrum(columns))

    def turns(self, matrix: Tensor) -> tuple[_Turn, _Turn]:
        """Return the turns of the left and of the right factor of ``matrix [B, P, Q]``."""
        target = between(matrix, self.row_metric, self.column_metric).contiguous()
        return (
            _Turn(target.mT, self.column_metric, self.row_spectrum),
            _Turn(target, self.row_metric, self.column_spectrum),
        )


def _stack(metrics: Sequence[Tensor | None]) -> Tensor | None:
    return None if metrics[0] is None else torch.stack([m for m in metrics if m is not None])


def _spectrum(metric: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if metric is None:
        return None
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp_min(0).unsqueeze(-2), vectors


class _Factor:
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
        self.basis = self.primal / (self.rows[..., None] + _TINY)
        # Fresh memory costs more than the element-wise steps that write to it.
        self._wanted, self._point = torch.empty_like(self.primal), torch.empty_like(self.primal)

    def move(self, turn: _Turn, basis: Tensor, step: _Step) -> None:
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
        unit = torch.div(self.primal, self.rows[..., None] + _TINY, out=wanted)
        torch.lerp(unit, self.basis, step.averaging, out=self.basis)


def _starts(signs: int) -> int:
    """Return how many random starts factors of so many signs get.

    The luck of a single one moves the error of a 64 x 64 weight by 1 %, that of a 384 x 384 weight by 0.1 %; and four
    small weights in a batch take half as long again as one.
    """
    return max(1, min(4, _FEW_SIGNS // signs))


def _best(given: WeightedWeight, products: Sequence[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    return min(
        products, key=lambda tried: squared_error(given.matrix, tried, given.row_metric, given.column_metric)
    )


def _in_parts(
    problem: _Problem,
    mid_features: int,
    config: FactorizerConfig,
    starts: int,
    progress: Callable[[float], object] | None,
) -> list[Product]:
    """Return a product for every matrix of the batch: the parts of each one after the other, side by side.

    The batch holds every weight ``starts`` times in a row; each of them has another start, equal for all weights.
    """
    generator = torch.Generator().manual_seed(config.seed)
    rows, columns = problem.matrix.shape[1:]
    sizes = _part_sizes(mid_features, rows, columns)
    # Turns of parts take little more than half the time of those of the whole.
    iterations = config.iterations if len(sizes) == 1 else config.iterations * 3 // 2
    residual = problem.matrix
    products: list[Product] = []
    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    for index, size in enumerate(sizes):
        unit = residual.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(_TINY)
        if products:
            kept = (
                torch.stack([_unit(product.scale_out) for product in products]),
                torch.stack([_unit(product.scale_in) for product in products]),
            )
        told = None
        if progress is not None:
            told = partial(_tell, progress, sum(sizes[:index]) / mid_features, size / mid_features)
        parts = _alternate(problem.turns(residual / unit), size, kept, starts, generator, iterations, told)
        products = [_beside(*pair) for pair in zip(products, parts, strict=True)] if products else parts
        products = [
            refit_scales(
                problem.matrix[i], p, _at(problem.row_metric, i), _at(problem.column_metric, i)
            ).nonnegative
            for i, p in enumerate(products)
        ]
        residual = problem.matrix - torch.stack([product.dense() for product in products])
    return products


def _part_sizes(mid_features: int, rows: int, columns: int) -> list[int]:
    """Return the middle dimensions of the parts: falling, and none of more than about two bits."""
    bits = mid_features * (rows + columns) / (rows * columns)
    count = min(mid_features, max(1, math.ceil(bits / _BITS_OF_A_PART)))
    ends = [0.0]
    for index in range(count):
        share = 1.0 if count == 1 else 1.2 - 0.4 * index / (count - 1)
        ends.append(ends[-1] + share)
    cuts = [round(mid_features * end / ends[-1]) for end in ends]
    return [high - low for low, high in pairwise(cuts) if high > low]


def _tell(progress: Callable[[float], object], before: float, share: float, done: float) -> None:
    progress(min(1.0, before + share * done))


def _unit(vector: Tensor) -> Tensor:
    return torch.div(vector, torch.linalg.vector_norm(vector).clamp_min(_TINY))


def _at(metric: Tensor | None, index: int) -> Tensor | None:
    return None if metric is None else metric[index]


def _beside(left: Product, right: Product) -> Product:
    """Return the middle features of two products side by side, whose outer and inner scales have one direction.

    The middle scales of the second are in another unit: they have to be fitted.
    """
    return left._replace(
        signs_out=torch.cat([left.signs_out, right.signs_out], dim=1),
        signs_in=torch.cat([left.signs_in, right.signs_in]),
        scale_mid=torch.cat([left.scale_mid, right.scale_mid]),
    )


def _alternate(
    turns: tuple[_Turn, _Turn],
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
    right = _Factor(drawn, kept[1])
    left = _Factor(right.primal.new_zeros(batch, mid_features, left_size), kept[0])
    whole = any(turn.basis_metric is not None for turn in turns)
    for done, step in enumerate(_schedule(iterations, whole), start=1):
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


def _solve(turn: _Turn, basis: Tensor, wanted: Tensor, step: _Step, out: Tensor) -> None:
    """Write to ``out`` the V that solves the normal equations with the right side ``wanted``; see the head."""
    normal = between(basis, None, turn.basis_metric) @ basis.mT
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
