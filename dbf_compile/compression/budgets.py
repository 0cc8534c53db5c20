"""Budgets: the middle dimension of each weight, so that a model of a given size loses least.

    min  Σ_l  weight_l · error_l(R_l)        subject to   Σ_l stored_bits(K_l, R_l, N_l) ≤ bits · Σ_l N_l K_l

``error_l`` is an error curve: the relative error, measured by short factorizations at a few R (``curves``), and
log-linear in R between and beyond them. ``weight_l`` = tr(L W R Wᵀ) turns the error into the loss that it causes, to second
order (see ``importance``).

``formulas`` has the stored bits. One more middle feature takes 32 ceil(K / 32) + 16 bits, and 32 N more where it starts a
new word of ``signs_out``. So R grows in steps of ``multiple``. Each error curve is replaced by its lower convex hull, on
which it is optimal to take the steepest step first. The bits that no further step fits are used up, or gained back, one
middle feature at a time.

Source: measured curves, greedy steps and the prior on depth as in published replications of NanoQuant (Spearman
correlation with the true loss 0.77); the hull and the exact use of the remainder are our own.

Shape letters: K in_features, R mid_features, N out_features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dbf_compile.errors import OptionError
from dbf_compile.factors import mid_features_for, stored_bits
from dbf_compile.options import MAX_BITS, MIN_BITS
from dbf_compile.signs import words_per_row

_TOLERANCE = 1e-3  # share of the budget that may stay unused


@dataclass(frozen=True)
class ErrorCurve:
    """The loss of a weight, or of several stacked ones, as a function of its middle dimension.

    Args:
        in_features: K.
        out_features: N.
        points: (R, relative error) in rising order of R, at least one; errors above 0.
        weight: loss at a relative error of 1.

    Raises:
        OptionError: the points are not as said.
    """

    in_features: int
    out_features: int
    points: tuple[tuple[int, float], ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1 or min(e for _, e in self.points) <= 0:
            raise OptionError(
                f"an error curve through {self.points}",
                "points (mid_features, error) in rising order of mid_features, errors above 0",
                "measure at one middle dimension or more",
            )

    @property
    def size(self) -> int:
        """The number of weights, N · K."""
        return self.in_features * self.out_features

    def bits(self, mid_features: int) -> int:
        """Return the stored bits at R = ``mid_features``."""
        return stored_bits(self.in_features, mid_features, self.out_features)

    def mid_features(self, bits_per_weight: float) -> int:
        """Return the largest R within ``bits_per_weight``, at least 1."""
        return max(1, mid_features_for(bits_per_weight, self.in_features, self.out_features))

    def loss(self, mid_features: int) -> float:
        """Return ``weight`` times the error at R = ``mid_features``, log-linear in R between and beyond the points."""
        # At R = 0 the weight is approximated by zeros, whose relative error is 1.
        points = [(0, 0.0), *((size, math.log(error)) for size, error in self.points)]
        segments = list(pairwise(points))
        (low, left), (high, right) = next((s for s in segments if mid_features <= s[1][0]), segments[-1])
        return self.weight * math.exp(left + (right - left) * (mid_features - low) / (high - low))


@dataclass(frozen=True)
class Allocation:
    """The middle dimension of every weight.

    Args:
        mid_features: R by name.
        reasons: by name, the limit that decided on R: "override", "floor", "ceiling", or "" for none.
        curves: error curves by name.
        bits_per_weight: the target, of all weights together.
    """

    mid_features: Mapping[str, int]
    reasons: Mapping[str, str]
    curves: Mapping[str, ErrorCurve]
    bits_per_weight: float

    @property
    def stored(self) -> int:
        """The stored bits of all weights."""
        return sum(self.curves[name].bits(size) for name, size in self.mid_features.items())

    @property
    def true_bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return self.stored / sum(curve.size for curve in self.curves.values())

    @property
    def predicted(self) -> float:
        """The predicted loss, divided by that of equal bits for all weights."""
        uniform = sum(curve.loss(curve.mid_features(self.bits_per_weight)) for curve in self.curves.values())
        return sum(self.curves[name].loss(size) for name, size in self.mid_features.items()) / uniform

    def rows(self) -> list[dict[str, Any]]:
        """Return a table with one row for every weight: size, bits, error, share of the loss, reason."""
        losses = {name: self.curves[name].loss(size) for name, size in self.mid_features.items()}
        total = sum(losses.values()) or 1.0
        rows = []
        for name, size in self.mid_features.items():
            curve = self.curves[name]
            rows.append(
                {
                    "name": name,
                    "shape": f"{curve.out_features}x{curve.in_features}",
                    "mid_features": size,
                    "uniform": curve.mid_features(self.bits_per_weight),
                    "bits_per_weight": round(curve.bits(size) / curve.size, 3),
                    "error": float(f"{losses[name] / curve.weight:.3g}") if curve.weight else 0.0,
                    "share_of_loss": round(losses[name] / total, 4),
                    "reason": self.reasons[name],
                }
            )
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        head = [*rows[0]] if rows else []
        table = [head, *([str(value) for value in row.values()] for row in rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = [
            "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) for line in table
        ]
        lines.append(
            f"{self.true_bits_per_weight:.4f} bits per weight of {self.bits_per_weight}; "
            f"predicted loss {self.predicted:.3f} of that of equal bits"
        )
        return "\n".join(lines)


def allocate_bits(
    curves: Mapping[str, ErrorCurve],
    bits_per_weight: float,
    *,
    multiple: int = 32,
    floor: float | None = None,
    ceiling: float | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Allocation:
    """Choose the middle dimensions that lose least within a budget of bits.

    The budget is never exceeded, and met to 0.1 %, or to a few words where there are few and small weights.

    Args:
        curves: error curves of the weights, by name.
        bits_per_weight: stored bits per weight over all weights, scales and padding counted.
        multiple: middle dimensions are multiples of this, for kernels that like whole words; a few weights, which use up
            the remainder, are not.
        floor: least bits per weight of a weight; None for half of ``bits_per_weight``.
        ceiling: most bits per weight of a weight; None for twice ``bits_per_weight``.
        fixed: bits per weight of weights that are not free, by name.

    Raises:
        OptionError: a number is out of range, ``fixed`` has an unknown name, floors and fixed weights exceed the budget, or
            ceilings leave too much of it unused.
    """
    floor = bits_per_weight / 2 if floor is None else floor
    ceiling = 2 * bits_per_weight if ceiling is None else ceiling
    fixed = fixed or {}
    _check(curves, bits_per_weight, multiple, floor, ceiling, fixed)
    budget = bits_per_weight * sum(curve.size for curve in curves.values())
    limits = {
        name: (curve.mid_features(fixed[name]),) * 2
        if name in fixed
        else _range(curve, floor, bits_per_weight, ceiling, multiple)
        for name, curve in curves.items()
    }
    chosen = {name: low for name, (low, _) in limits.items()}
    left = budget - sum(curve.bits(chosen[name]) for name, curve in curves.items())
    if left < 0:
        raise OptionError(
            f"a budget of {bits_per_weight} bits per weight, which floors and overrides exceed by "
            f"{-left / budget:.1%}",
            "a budget that leaves room",
            "lower floor, or give the overridden layers fewer bits",
        )
    free = {name: (curves[name], *limits[name]) for name in curves if name not in fixed}
    left = _take_steps(chosen, left, _hull_steps(free, multiple), curves)
    left = _take_steps(chosen, left, _single_steps(free, multiple), curves)
    if left > _TOLERANCE / 2 * budget:
        left = _overshoot_and_trim(chosen, left, free, multiple)
    left = _fill(chosen, left, free)
    if left > _TOLERANCE * budget and all(chosen[name] >= high for name, (_, high) in limits.items()):
        raise OptionError(
            f"a budget of {bits_per_weight} bits per weight, of which ceilings leave {left / budget:.1%} unused",
            "a budget that the weights can use",
            "raise ceiling, or lower the budget",
        )
    reasons = {name: "override" if name in fixed else _reason(chosen[name], limits[name]) for name in curves}
    return Allocation(chosen, reasons, dict(curves), bits_per_weight)


def _check(
    curves: Mapping[str, ErrorCurve],
    bits_per_weight: float,
    multiple: int,
    floor: float,
    ceiling: float,
    fixed: Mapping[str, float],
) -> None:
    for name, bits in (("bits_per_weight", bits_per_weight), *fixed.items()):
        if not MIN_BITS <= bits <= MAX_BITS:
            raise OptionError(
                f"{bits} bits for {name!r}", f"{MIN_BITS} to {MAX_BITS}", "2.0 is a usual value"
            )
    if not 0 <= floor <= bits_per_weight <= ceiling:
        raise OptionError(
            f"floor={floor}, ceiling={ceiling} for {bits_per_weight} bits per weight",
            "floor ≤ bits_per_weight ≤ ceiling",
            "leave them out for half and twice the bits",
        )
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise OptionError(f"multiple={multiple!r}", "a whole number of 1 or more", "32 suits all kernels")
    unknown = sorted(set(fixed) - set(curves))
    if unknown or not curves:
        raise OptionError(
            f"bits for {unknown}" if unknown else "no error curves",
            ", ".join(curves) or "at least one weight",
            "use the names of the curves",
        )


def _range(
    curve: ErrorCurve, floor: float, bits_per_weight: float, ceiling: float, multiple: int
) -> tuple[int, int]:
    """Return the least and the largest R, multiples where there is one between floor and ceiling.

    The least R is never above that of ``bits_per_weight``, so that floors of free weights always fit the budget.
    """
    low, high = curve.mid_features(floor), curve.mid_features(ceiling)
    up, down = -(-low // multiple) * multiple, high // multiple * multiple
    low, high = (up, down) if up <= down else (low, high)
    return min(low, curve.mid_features(bits_per_weight)), high


def _reason(size: int, limits: tuple[int, int]) -> str:
    low, high = limits
    return "floor" if size <= low else "ceiling" if size >= high else ""


_Free = Mapping[str, tuple[ErrorCurve, int, int]]  # the curve, the least and the largest R
_Move = tuple[float, str, int, int]  # loss saved per bit, name, old R, new R


def _move(name: str, curve: ErrorCurve, start: int, end: int) -> _Move:
    saved = (curve.loss(start) - curve.loss(end)) / max(1, curve.bits(end) - curve.bits(start))
    return saved, name, start, end


def _hull_steps(free: _Free, multiple: int) -> list[_Move]:
    """Return the steps along the lower convex hulls of all curves, steepest first."""
    moves = []
    for name, (curve, low, high) in free.items():
        hull: list[int] = []
        for size in _grid(low, high, multiple):
            while (
                len(hull) > 1 and _move(name, curve, *hull[-2:])[0] <= _move(name, curve, hull[-1], size)[0]
            ):
                hull.pop()
            hull.append(size)
        moves += [_move(name, curve, *step) for step in pairwise(hull)]
    return sorted(moves, key=lambda move: -move[0])


def _single_steps(free: _Free, multiple: int) -> list[_Move]:
    """Return all steps of one multiple, steepest first; some fit where no step of a hull does."""
    moves = [
        _move(name, curve, *step)
        for name, (curve, low, high) in free.items()
        for step in pairwise(_grid(low, high, multiple))
    ]
    return sorted(moves, key=lambda move: -move[0])


def _grid(low: int, high: int, multiple: int) -> Sequence[int]:
    return sorted({low, *range(-(-low // multiple) * multiple, high + 1, multiple), high})


def _take_steps(
    chosen: dict[str, int], left: float, moves: Iterable[_Move], curves: Mapping[str, ErrorCurve]
) -> float:
    """Take the moves, in this order, that start at the chosen R and fit; return the bits that are left."""
    for _, name, start, end in moves:
        cost = curves[name].bits(end) - curves[name].bits(start)
        if chosen[name] == start and cost <= left:
            chosen[name] = end
            left -= cost
    return left


def _overshoot_and_trim(chosen: dict[str, int], left: float, free: _Free, multiple: int) -> float:
    """Take one step too many, then give back single middle features until the budget is met.

    The step that saves most per bit is tried first; steps of a single middle feature, which need the least back, are tried
    last. Returns the bits that are left.
    """
    steps = [
        (size == 1, *_move(name, curve, chosen[name], min(high, chosen[name] + size)))
        for name, (curve, _, high) in free.items()
        for size in {multiple, 1}
        if chosen[name] < high
    ]
    for _, _, name, start, end in sorted(steps, key=lambda step: (step[0], -step[1])):
        curve = free[name][0]
        trial = {**chosen, name: end}
        over = curve.bits(end) - curve.bits(start) - left
        while over > 0:
            # Within a word of signs_out: each saves a row of signs_in, and none frees a whole column of N words.
            cuts = [
                _move(other, item, trial[other] - 1, trial[other])
                for other, (item, low, _) in free.items()
                if other != name
                and trial[other] > max(low, 1)
                and words_per_row(trial[other] - 1) == words_per_row(trial[other])
            ]
            if not cuts:
                break
            _, other, smaller, larger = min(cuts)
            trial[other] = smaller
            over -= free[other][0].bits(larger) - free[other][0].bits(smaller)
        if over <= 0:
            chosen.update(trial)
            return -over
    return left


def _fill(chosen: dict[str, int], left: float, free: _Free) -> float:
    """Add single middle features while one fits, the most useful first; return the bits that are left."""
    while True:
        moves = [
            _move(name, curve, chosen[name], chosen[name] + 1)
            for name, (curve, _, high) in free.items()
            if chosen[name] < high and curve.bits(chosen[name] + 1) - curve.bits(chosen[name]) <= left
        ]
        if not moves:
            return left
        _, name, start, end = max(moves)
        left -= free[name][0].bits(end) - free[name][0].bits(start)
        chosen[name] = end
