"""ADMM for one weight: a dense matrix into double binary factors, weighted by importance.

    min  ‖ D_rows · (W − Ŵ) · D_columns ‖²
    Ŵ = diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

Source: Boža and Macko, "Addition is almost all you need: Compressing neural networks with double binary
factorization" (arXiv 2505.11076); constants and order of updates as in the authors' notebooks.

The weighted matrix [N, K] is approximated by ``leftᵀ · right`` with left [R, N] and right [R, K], in turns.
Each turn fixes one factor, its rows scaled to norm 1, as ``basis``, and improves the other by these
inner iterations:

    solution = (basis · basisᵀ + (ridge + rho) I)⁻¹ (basis · target + rho (primal − dual))
    primal   = project(solution + dual)              signs with a rank-one magnitude
    dual     = dual + solution − primal

In outer iteration t of T, rho is (t / (T − 3))³ in the first inner iteration and 1 in the others. A matrix
with N ≥ K is factored transposed, so that the factor on the short side is updated first.

Differs from the notebooks:

* The power iteration starts from ones (see ``projection``). The only random numbers are the start of
  ``right``: that of ``left`` is never read, for rho is 0 when it would be.
* One scalar is fitted at the end. It undoes what the ridge shrinks and bounds the error by that of zeros.
* The size of the weight is spread evenly over the three scales, which are rounded to float16.

Known to be missing: size annealing (later version of the paper), full curvature in place of its diagonal,
refinement of single signs.

Shape letters: K in_features, R mid_features, N out_features; Q is N or K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dbf_compile.compression.importance import Importance, WeightedWeight
from dbf_compile.compression.projection import POWER_ITERATIONS, half_scales, project, signs_of
from dbf_compile.errors import OptionError, WeightError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.signs import pack_signs

_TINY = 1e-12  # the notebooks' floor on norms


@dataclass(frozen=True, kw_only=True)
class FactorizerConfig:
    """Settings of the factorizer; the defaults are those of the paper's authors.

    Args:
        iterations: outer iterations; each updates both factors. Time grows with it in proportion.
        inner_iterations: solves per factor and outer iteration.
        ridge: added to the diagonal of the normal equations, in units of its mean.
        power_iterations: power iterations per projection.
        seed: of the random start; equal seeds give equal factors.

    Raises:
        OptionError: a value is of the wrong type or range.
    """

    iterations: int = 260
    inner_iterations: int = 3
    ridge: float = 0.03
    power_iterations: int = POWER_ITERATIONS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("iterations", 1), ("inner_iterations", 1), ("power_iterations", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
                raise OptionError(
                    f"{name}={value!r}", f"a whole number of {low} or more", f"leave {name} at its default"
                )
        if not isinstance(self.ridge, (int, float)) or not 1e-4 <= self.ridge <= 1e4:
            # Below 1e-4 the normal equations of parallel rows are singular in float32.
            raise OptionError(
                f"ridge={self.ridge!r}", "a number from 1e-4 to 1e4", "leave ridge at its default"
            )


class HasDense(Protocol):
    """Anything that stands for a dense weight: ``DoubleBinaryFactors``, ``OneBitFactors``."""

    def dense(self, dtype: torch.dtype = ...) -> Tensor:
        """Return the weight [N, K] in ``dtype``."""


@torch.no_grad()
def factorize(
    weight: Tensor,
    mid_features: int,
    importance: Importance | None = None,
    config: FactorizerConfig = FactorizerConfig(),
) -> DoubleBinaryFactors:
    """Factor a dense weight: ``weight [N, K] ≈ factors.dense()``.

    Repeatable bit for bit on one machine at one number of threads; another number of threads changes the
    order of float32 sums, and with it single signs. Neither reads nor moves the global random state.

    Args:
        weight: floating point [N, K], any device; computed in float32 on that device.
        mid_features: R, 1 or more.
        importance: second moments of the layer, or None to weigh all entries alike.
        config: settings.

    Returns:
        Factors on the device of the weight, scales in float16 with equal root mean squares.

    Raises:
        WeightError: weight, importance or ``mid_features`` cannot be factored, or the scales do not fit
        float16.
    """
    if not isinstance(mid_features, int) or isinstance(mid_features, bool) or mid_features < 1:
        raise WeightError(
            f"mid_features={mid_features!r}",
            "a whole number of 1 or more",
            "give the layer more bits per weight",
        )
    # Autocast would turn the products below into bfloat16.
    with torch.autocast(weight.device.type if isinstance(weight, Tensor) else "cpu", enabled=False):
        given = WeightedWeight.of(weight, importance)
        tall = weight.shape[0] >= weight.shape[1]
        left, middle, right = _alternate(given.matrix.T if tall else given.matrix, mid_features, config)
        outer, inner = (right, left) if tall else (left, right)
        scale_in, scale_mid, scale_out = half_scales(
            given.unit, inner.columns / given.columns, middle, outer.columns / given.rows
        )
        signs_in, signs_out = signs_of(inner.primal), signs_of(outer.primal).T
        return DoubleBinaryFactors(
            pack_signs(signs_in), pack_signs(signs_out), scale_in, scale_mid, scale_out
        )


@torch.no_grad()
def weighted_error(
    weight: Tensor, approximation: Tensor | HasDense, importance: Importance | None = None
) -> float:
    """Return the relative squared error: ``‖D_rows (W − Ŵ) D_columns‖² / ‖D_rows W D_columns‖²``.

    1 is the error of zeros. For a weight of zeros it is 0 where the approximation is zero as well, else
    infinite.

    Args:
        weight: floating point [N, K].
        approximation: Ŵ, a matrix [N, K] or factors that have ``dense``.
        importance: the weights of rows and columns; None for the plain Frobenius norm.

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
    weights = given.rows.double()[:, None] * given.columns.double()
    exact = weight.double() / peak
    missed = (weights * (exact - dense.to(weight.device).double() / peak)).square().sum()
    return float(missed / (weights * exact).square().sum())


class _Factor(NamedTuple):
    """A factor on its way: ``primal [R, Q] = signs ⊙ (rows [R] · columns [Q]ᵀ)``, and its ``dual [R, Q]``."""

    primal: Tensor
    dual: Tensor
    rows: Tensor
    columns: Tensor

    def basis(self) -> Tensor:
        """Return ``primal`` with its rows scaled to norm 1."""
        # The norms of the rows are ``rows``, since ``columns`` has norm 1.
        return self.primal / (self.rows[:, None] + _TINY)


def _alternate(
    matrix: Tensor, mid_features: int, config: FactorizerConfig
) -> tuple[_Factor, Tensor, _Factor]:
    """Return left [R, P], middle [R] and right [R, Q] of ``matrix [P, Q]``.

    ``matrix ≈ (signs_left ⊙ columns_left)ᵀ · diag(middle) · (signs_right ⊙ columns_right)``
    """
    left, right = (_start(mid_features, size, config.seed, matrix.device) for size in matrix.shape)
    if not bool(matrix.any()):
        return left, torch.zeros_like(left.rows), right
    for step in range(config.iterations):
        rho = min(1.0, step / max(1, config.iterations - 3)) ** 3
        left = _improve(left, right.basis(), matrix.T, rho, config)
        right = _improve(right, left.basis(), matrix, rho, config)
    approximation = left.basis().T @ right.primal
    fit = (matrix * approximation).sum() / approximation.square().sum().clamp_min(_TINY)
    return left, fit * right.rows * (left.rows / (left.rows + _TINY)), right


def _start(mid_features: int, size: int, seed: int, device: torch.device) -> _Factor:
    # Drawn on the CPU, so that all devices start alike.
    generator = torch.Generator().manual_seed(seed)
    primal = torch.randn(mid_features, size, generator=generator, dtype=torch.float32, device="cpu").to(
        device
    )
    return _Factor(primal, torch.zeros_like(primal), primal.norm(dim=1), torch.ones_like(primal[0]))


def _improve(factor: _Factor, basis: Tensor, target: Tensor, rho: float, config: FactorizerConfig) -> _Factor:
    """Return ``factor [R, Q]`` after the inner iterations on ``basis [R, P]``, ``target [P, Q]``."""
    normal = basis @ basis.T
    normal.diagonal().add_(config.ridge * normal.diagonal().mean())
    wanted = basis @ target
    inverse = _inverse(normal, rho)
    for inner in range(config.inner_iterations):
        if inner == 1:
            rho, inverse = 1.0, _inverse(normal, 1.0)
        solution = inverse @ torch.add(wanted, factor.primal - factor.dual, alpha=rho)
        total = solution.add_(factor.dual)
        primal, rows, columns = project(total, config.power_iterations)
        factor = _Factor(primal, total.sub_(primal), rows, columns)
    return factor


def _inverse(normal: Tensor, rho: float) -> Tensor:
    """Return ``(normal + rho I)⁻¹``; the ridge in ``normal`` bounds its condition number by 1 + R / ridge.

    One product with the inverse takes less time than two triangular solves, and keeps the row-major layout
    that the element-wise steps after it need: 18 % of the whole on 1536 x 384, R = 307, one core.
    """
    shifted = normal.clone()
    shifted.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed):
        raise WeightError(
            "normal equations that are not positive definite",
            "float32 products of full precision",
            "turn TF32 off while factoring, or raise ridge",
        )
    return torch.cholesky_inverse(factor)
