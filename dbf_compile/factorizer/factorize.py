"""Factor dense weights, weighted by importance, into double binary factors.

    min  tr(L · E · R · Eᵀ)            E = W − Ŵ;  L and R as in ``importance``, diagonal or whole
    Ŵ = diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

Source: Boža and Macko, "Addition is almost all you need: Compressing neural networks with double binary
factorization" (arXiv 2505.11076); ``admm`` has the algorithm for one product of factors.

Above two bits the middle dimension is cut into slices. ADMM finds the first slice as above; each further slice
approximates the residual, with the outer and inner scales kept. The errors of slices multiply: 2 + 2 bits come near the
square of the error of 2. A single search over the whole middle dimension falls behind that, presumably because with
M > P many solutions fit the matrix equally well before they are rounded, and the pull towards signs has little to choose
by.

Differs from the paper, besides: the result is refined (``refine``), and the magnitude of the weight is divided evenly
among the three scales, which are rounded to float16.

Shape letters: K in_features, N out_features, M mid_features (R elsewhere, where no curvature has that name); B weights
of a batch; P, Q are N, K, or K, N where N ≥ K: the factor on the short side is updated first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dbf_compile.errors import OptionError, WeightError
from dbf_compile.factorizer.admm import Problem, run_admm
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import TINY, half_scales
from dbf_compile.factorizer.refine import Product, refine, refit_scales, squared_error
from dbf_compile.factorizer.weighted import WeightedWeight, squared_norm
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.options import PRESETS
from dbf_compile.signs import pack_signs

_BITS_OF_A_SLICE = 2.1  # sign bits per weight; above, two slices are better than one
_FEW_BITS = 0.8  # sign bits per weight; below, 250 iterations can be 0.3 % behind the authors' factorizer
_EXTRA_ITERATIONS = 125  # make up for that
_FEW_SIGNS = 2**14  # factors of a quarter of them get four starts


@dataclass(frozen=True, kw_only=True)
class FactorizerConfig:
    """Settings of the factorizer.

    Args:
        iterations: ADMM iterations, 1 or more; ``PRESETS`` has usual numbers. Every doubling lowers the error by
            about 2 %. The factorizer makes half as many again above 2.1 sign bits per weight, and below 0.8, where it
            adds at most 125.
        sweeps: passes of refinement after ADMM, 0 or more.
        seed: of the random starts, 0 or more; equal seeds give equal factors. Small weights get up to four starts.

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

    The result is repeatable bit for bit on one machine with one number of threads. Another number of threads changes
    the order of float32 sums, and with it single signs. The global random state is neither read nor changed.

    Args:
        weight: floating point [N, K], on any device. All is computed there in float32, in about 16 times the memory of
            the weight in float32 at 2 bits.
        mid_features: M, 1 or more; ``mid_features_for`` computes it from bits per weight.
        importance: second moments of the layer; None weighs all entries alike.
        config: settings.
        progress: called after every iteration with the fraction done, 0 to 1.

    Returns:
        Factors on the device of the weight; scales in float16 with equal root mean squares.

    Raises:
        WeightError: the weight, its importance or ``mid_features`` cannot be factored, or a scale overflows float16.
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
    """Factor weights of one shape as a batch, which keeps a GPU busy with small weights.

    Args:
        weights: floating point [N, K], all of one shape on one device.
        mid_features: M, 1 or more.
        importances: one for each weight; None for no importance. On either side all are diagonal or all are whole.
        config: settings; every weight starts from the same random numbers.
        progress: called after every iteration with the fraction done, 0 to 1.

    Returns:
        The factors of each weight; those of :func:`factorize` up to the order of float32 sums.

    Raises:
        WeightError: as for :func:`factorize`, or the weights do not form a batch.
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
        weighted = [WeightedWeight.of(*pair) for pair in zip(weights, importances, strict=True)]
        tall = all(item.matrix.shape[0] >= item.matrix.shape[1] for item in weighted)
        if tall:
            weighted = [item.transposed for item in weighted]
        problem = Problem.of(weighted)
        starts = _starts(mid_features * sum(problem.matrix.shape[1:]))
        if starts > 1:
            problem = Problem.of([item for item in weighted for _ in range(starts)])
        products = _factor_in_slices(problem, mid_features, config, starts, progress)
        return [
            _finish(item, products[index * starts : (index + 1) * starts], config.sweeps, tall)
            for index, item in enumerate(weighted)
        ]


@torch.no_grad()
def weighted_error(
    weight: Tensor, approximation: Tensor | HasDense, importance: Importance | None = None
) -> float:
    """Return the relative error of an approximation: ``tr(L E R Eᵀ) / tr(L W R Wᵀ)``.

    With diagonal L and R it is the relative squared error, weighted by row and column. An approximation by zeros has the error 1. The error of a weight of zeros is 0 where the approximation is zero as
    well, else infinite.

    Args:
        weight: W, floating point [N, K].
        approximation: Ŵ, a matrix [N, K] or factors with a method ``dense``.
        importance: L and R; None for the squared Frobenius norm.

    Raises:
        WeightError: the weight or its importance is not valid, or the approximation has another shape.
    """
    weighted = WeightedWeight.of(weight, importance)
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
        None if metric is None else metric.double()
        for metric in (weighted.row_metric, weighted.column_metric)
    ]

    def size(matrix: Tensor) -> float:
        return squared_norm(weighted.rows.double()[:, None] * matrix * weighted.columns.double(), *metrics)

    exact = weight.double() / peak
    return size(exact - dense.to(weight.device).double() / peak) / size(exact)


def _starts(signs: int) -> int:
    """Return the number of random starts for factors of so many signs.

    The luck of a single start moves the error of a 64 x 64 weight by 1 %, that of a 384 x 384 weight by 0.1 %. Four small
    weights in a batch take half as long again as one.
    """
    return max(1, min(4, _FEW_SIGNS // signs))


def _finish(
    weighted: WeightedWeight, products: Sequence[Product], sweeps: int, transposed: bool
) -> DoubleBinaryFactors:
    """Return the best of ``products``, one of every start, refined and as factors of the unweighted weight."""
    product = _best(weighted, products)
    product = refine(weighted.matrix, product, weighted.row_metric, weighted.column_metric, sweeps)
    product = product._replace(
        scale_out=product.scale_out / weighted.rows, scale_in=product.scale_in / weighted.columns
    )
    if transposed:
        product = product.transposed
    scales = half_scales(weighted.unit, product.scale_in, product.scale_mid, product.scale_out)
    return DoubleBinaryFactors(pack_signs(product.signs_in), pack_signs(product.signs_out), *scales)


def _best(weighted: WeightedWeight, products: Sequence[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    metrics = weighted.row_metric, weighted.column_metric
    return min(products, key=lambda product: squared_error(weighted.matrix, product, *metrics))


def _factor_in_slices(
    problem: Problem,
    mid_features: int,
    config: FactorizerConfig,
    starts: int,
    progress: Callable[[float], object] | None,
) -> list[Product]:
    """Return a product for every matrix of the batch, found slice after slice of the middle dimension.

    The batch holds every weight ``starts`` times in a row. Its copies have different starts, which are the same for all
    weights.
    """
    generator = torch.Generator().manual_seed(config.seed)
    rows, columns = problem.matrix.shape[1:]
    bits = mid_features * (rows + columns) / (rows * columns)
    sizes = _slice_sizes(mid_features, bits)
    iterations = _iterations(config.iterations, bits)
    residual = problem.matrix
    products: list[Product] = []
    directions: tuple[Tensor | None, Tensor | None] = (None, None)
    for index, size in enumerate(sizes):
        unit = residual.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(TINY)
        if products:
            directions = (
                torch.stack([_unit(product.scale_out) for product in products]),
                torch.stack([_unit(product.scale_in) for product in products]),
            )
        advance = None
        if progress is not None:
            advance = partial(_advance, progress, sum(sizes[:index]) / mid_features, size / mid_features)
        subproblems = problem.subproblems(residual / unit)
        slices = run_admm(subproblems, size, directions, starts, generator, iterations, advance)
        products = [_beside(*pair) for pair in zip(products, slices, strict=True)] if products else slices
        products = [
            refit_scales(
                problem.matrix[i], p, _at(problem.row_metric, i), _at(problem.column_metric, i)
            ).nonnegative
            for i, p in enumerate(products)
        ]
        residual = problem.matrix - torch.stack([product.dense() for product in products])
    return products


def _iterations(iterations: int, bits: float) -> int:
    """Return the iterations for each slice of a weight with ``bits`` sign bits per weight."""
    if bits > _BITS_OF_A_SLICE:
        return (
            iterations * 3 // 2
        )  # an iteration on a slice takes little more than half the time of one on the whole
    if bits < _FEW_BITS:
        return iterations + min(iterations // 2, _EXTRA_ITERATIONS)
    return iterations


def _slice_sizes(mid_features: int, bits: float) -> list[int]:
    """Return the middle dimensions of the slices: falling, and none of more than about two bits."""
    count = min(mid_features, max(1, math.ceil(bits / _BITS_OF_A_SLICE)))
    ends = [0.0]
    for index in range(count):
        share = 1.0 if count == 1 else 1.2 - 0.4 * index / (count - 1)
        ends.append(ends[-1] + share)
    cuts = [round(mid_features * end / ends[-1]) for end in ends]
    return [high - low for low, high in pairwise(cuts) if high > low]


def _advance(progress: Callable[[float], object], before: float, share: float, done: float) -> None:
    progress(min(1.0, before + share * done))


def _unit(vector: Tensor) -> Tensor:
    return torch.div(vector, torch.linalg.vector_norm(vector).clamp_min(TINY))


def _at(metric: Tensor | None, index: int) -> Tensor | None:
    return None if metric is None else metric[index]


def _beside(left: Product, right: Product) -> Product:
    """Return two products with equal directions of outer and inner scales as one, middle features side by side.

    The middle scales of the second product are in another unit; they must be refitted.
    """
    return left._replace(
        signs_out=torch.cat([left.signs_out, right.signs_out], dim=1),
        signs_in=torch.cat([left.signs_in, right.signs_in]),
        scale_mid=torch.cat([left.scale_mid, right.scale_mid]),
    )
