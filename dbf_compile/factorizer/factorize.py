"""ADMM for one weight: a dense matrix into double binary factors, weighted by importance.

    min  tr(L · E · R · Eᵀ)            E = W − Ŵ;  L and R as in ``importance``, diagonal or whole
    Ŵ = diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

Source: Boža and Macko, "Addition is almost all you need: Compressing neural networks with double binary
factorization" (arXiv 2505.11076); ``turns`` has the algorithm for one product of factors.

Above two bits the middle dimension is split: the first part is found as above, the next ones approximate what it
leaves, with its outer and inner scales kept. Errors of parts multiply, so that 2 + 2 bits come near the square of the
error of 2. A single search over all of it falls behind that, presumably because with M > P many solutions fit the matrix
equally well before they are rounded, and the pull towards signs has little to choose by.

Differs from the paper, besides: the result is refined (``refine``); the size of the weight is spread evenly over the
three scales, which are rounded to float16.

Shape letters: K in_features, N out_features, M mid_features (R elsewhere, where no curvature has that name); B weights
of a batch; P, Q are N, K, or K, N where N ≥ K: the factor on the short side moves first.
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
from dbf_compile.factorizer.admm import TINY, Problem, alternate
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import half_scales
from dbf_compile.factorizer.refine import Product, refine, refit_scales, squared_error
from dbf_compile.factorizer.weighted import WeightedWeight, squared_norm
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.options import PRESETS
from dbf_compile.signs import pack_signs

_BITS_OF_A_PART = 2.1  # sign bits per weight; above, two parts are better than one
_FEW_BITS = 0.8  # sign bits per weight; below, 250 turns can be 0.3 % behind the authors' factorizer
_MORE_TURNS = 125  # so many mend it
_FEW_SIGNS = 2**14  # factors of a quarter of them get four starts


@dataclass(frozen=True, kw_only=True)
class FactorizerConfig:
    """Settings of the factorizer.

    Args:
        iterations: turns of each factor; ``PRESETS`` has usual numbers. The schedule is stretched over them:
            more give smaller errors, about 2 % for every doubling. Above 2.1 sign bits per weight half as many
            again are made, below 0.8 too, but at most 125 more.
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
        problem = Problem.of(given)
        starts = _starts(mid_features * sum(problem.matrix.shape[1:]))
        if starts > 1:
            problem = Problem.of([item for item in given for _ in range(starts)])
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
    problem: Problem,
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
    bits = mid_features * (rows + columns) / (rows * columns)
    sizes = _part_sizes(mid_features, bits)
    iterations = _turns(config.iterations, bits)
    residual = problem.matrix
    products: list[Product] = []
    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    for index, size in enumerate(sizes):
        unit = residual.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(TINY)
        if products:
            kept = (
                torch.stack([_unit(product.scale_out) for product in products]),
                torch.stack([_unit(product.scale_in) for product in products]),
            )
        told = None
        if progress is not None:
            told = partial(_tell, progress, sum(sizes[:index]) / mid_features, size / mid_features)
        parts = alternate(problem.turns(residual / unit), size, kept, starts, generator, iterations, told)
        products = [_beside(*pair) for pair in zip(products, parts, strict=True)] if products else parts
        products = [
            refit_scales(
                problem.matrix[i], p, _at(problem.row_metric, i), _at(problem.column_metric, i)
            ).nonnegative
            for i, p in enumerate(products)
        ]
        residual = problem.matrix - torch.stack([product.dense() for product in products])
    return products


def _turns(iterations: int, bits: float) -> int:
    """Return the turns of each part of a weight that gets so many sign bits."""
    if bits > _BITS_OF_A_PART:
        return iterations * 3 // 2  # turns of parts take little more than half the time of those of the whole
    if bits < _FEW_BITS:
        return iterations + min(iterations // 2, _MORE_TURNS)
    return iterations


def _part_sizes(mid_features: int, bits: float) -> list[int]:
    """Return the middle dimensions of the parts: falling, and none of more than about two bits."""
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
    return torch.div(vector, torch.linalg.vector_norm(vector).clamp_min(TINY))


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
