"""Importance: how much each row and column of a weight counts, and the weight as the factorizer sees it.

Diagonal importances of the paper's calibration: i = E[x²] per input feature, o = E[(∂loss/∂y)²] per output
feature. Shape letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbf_compile.errors import WeightError

# The notebooks' floor: a feature that was never active still gets the scale that fits it best on its own.
FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class Importance:
    """Second moments around one linear layer; ``None`` where nothing is known: all features count alike.

    A constant factor in either has no effect. Zeros are allowed: they are floored where the weights are made.

    Args:
        input_second_moment: E[x²], floating point [K].
        output_grad_second_moment: E[(∂loss/∂y)²], floating point [N].

    Raises:
        WeightError: not a non-empty floating-point vector, or an entry is negative, NaN or infinite.
    """

    input_second_moment: Tensor | None = None
    output_grad_second_moment: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("input_second_moment", "output_grad_second_moment"):
            _check_moment(name, getattr(self, name))

    def __repr__(self) -> str:
        sizes = (
            "None" if moment is None else f"[{moment.numel()}]"
            for moment in (self.input_second_moment, self.output_grad_second_moment)
        )
        return "Importance(input_second_moment={}, output_grad_second_moment={})".format(*sizes)

    def feature_weights(
        self, out_features: int, in_features: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return what rows and columns of a weight are multiplied with: ``√(moment / mean(moment)) + 1e-8``.

        A moment that is None or zero throughout says nothing about the features and gives ones.

        Args:
            out_features: N of the weight.
            in_features: K of the weight.
            device: where the result lies.

        Returns:
            Positive float32 weights of the rows [N] and of the columns [K].

        Raises:
            WeightError: a moment has another length than the weight's side.
        """
        rows = _feature_weights("output_grad_second_moment", self.output_grad_second_moment, out_features)
        columns = _feature_weights("input_second_moment", self.input_second_moment, in_features)
        return rows.to(device), columns.to(device)

    @staticmethod
    def stack(items: Sequence[Importance], rows: Sequence[int]) -> Importance:
        """Return the importance of weights that read the same input, stacked along their rows.

        The input moment is the mean of those known. The output moments are concatenated; where one is missing
        its rows count as the mean of all known rows. A moment that no item knows stays None.

        Args:
            items: one importance per weight.
            rows: N of each weight.

        Raises:
            WeightError: no items, another number of rows than items, or moments whose lengths do not fit.
        """
        if not items or len(items) != len(rows):
            raise WeightError(
                f"{len(items)} importances for {len(rows)} weights",
                "one importance per weight, at least one",
                "pass Importance() for a weight without one",
            )
        inputs = [item.input_second_moment for item in items if item.input_second_moment is not None]
        if len({moment.numel() for moment in inputs}) > 1:
            raise WeightError(
                f"input_second_moment of lengths {[moment.numel() for moment in inputs]} for stacked weights",
                "one length: stacked weights read the same input",
                "stack only layers with equal in_features",
            )
        outputs = [item.output_grad_second_moment for item in items]
        for moment, count in zip(outputs, rows, strict=True):
            _check_length("output_grad_second_moment", moment, count)
        known = [moment.double() for moment in outputs if moment is not None]
        if not known:
            stacked = None
        else:
            mean = torch.cat(known).mean()
            parts = [
                mean.expand(count) if moment is None else moment.double()
                for moment, count in zip(outputs, rows, strict=True)
            ]
            stacked = torch.cat(parts).float()
        return Importance(
            torch.stack([m.double() for m in inputs]).mean(0).float() if inputs else None, stacked
        )


@dataclass(frozen=True, eq=False)
class WeightedWeight:
    """A weight as the factorizer sees it: ``W = unit · diag(1 / rows) · matrix · diag(1 / columns)``.

    Args:
        matrix: float32 [N, K], root mean square 1, or all zeros.
        rows: weights of the rows, float32 [N], positive.
        columns: weights of the columns, float32 [K], positive.
        unit: what ``matrix`` was divided by; 0 for a weight of zeros.
    """

    matrix: Tensor
    rows: Tensor
    columns: Tensor
    unit: float

    @staticmethod
    def of(weight: Tensor, importance: Importance | None = None) -> WeightedWeight:
        """Check a weight and bring it into the form that is factored.

        Args:
            weight: floating point [N, K], any device; not changed.
            importance: second moments of the layer, or None.

        Raises:
            WeightError: not a non-empty floating-point matrix, NaN or infinite entries, an importance that
            does
                not fit.
        """
        _check_weight(weight)
        rows, columns = (importance or Importance()).feature_weights(
            weight.shape[0], weight.shape[1], weight.device
        )
        # Entries near the ends of float32 would overflow or vanish when squared: bring the largest to 1
        # first.
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        peak = float(exact.abs().amax())
        if peak == 0.0:
            return WeightedWeight(exact.float(), rows, columns, 0.0)
        matrix = rows[:, None] * (exact / peak).float() * columns
        size = float(matrix.square().mean().sqrt())
        return WeightedWeight(matrix / size, rows, columns, peak * size)


def _feature_weights(name: str, moment: Tensor | None, length: int) -> Tensor:
    _check_length(name, moment, length)
    if moment is None or not bool(moment.any()):
        return torch.ones(length, device="cpu" if moment is None else moment.device, dtype=torch.float32)
    exact = moment.detach().double()
    exact = exact / exact.amax()  # so that the mean cannot overflow
    return ((exact / exact.mean()).sqrt() + FLOOR).float()


def _check_length(name: str, moment: Tensor | None, length: int) -> None:
    if moment is not None and moment.numel() != length:
        raise WeightError(
            f"{name} of length {moment.numel()} for a weight with {length} of these features",
            f"length {length}",
            "take weight and importance from the same layer",
        )


def _check_moment(name: str, moment: object) -> None:
    if moment is None:
        return
    if (
        not isinstance(moment, Tensor)
        or not moment.is_floating_point()
        or moment.dim() != 1
        or moment.numel() == 0
    ):
        got = (
            f"dtype {moment.dtype} and shape {tuple(moment.shape)}"
            if isinstance(moment, Tensor)
            else f"type {type(moment).__name__}"
        )
        raise WeightError(
            f"{name} of {got}", "a non-empty floating-point vector", "pass one second moment per feature"
        )
    if not bool(torch.isfinite(moment).all()) or bool((moment < 0).any()):
        raise WeightError(
            f"{name} with negative, NaN or infinite entries",
            "finite second moments of 0 or more",
            "calibrate again, in float32 where activations overflow",
        )


def _check_weight(weight: object) -> None:
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.dim() != 2
        or weight.numel() == 0
    ):
        got = (
            f"of dtype {weight.dtype} and shape {tuple(weight.shape)}"
            if isinstance(weight, Tensor)
            else f"of type {type(weight).__name__}"
        )
        raise WeightError(
            f"a weight {got}", "a non-empty floating-point matrix [N, K]", "dequantize or reshape it first"
        )
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(
            "a weight with NaN or infinite entries",
            "finite entries",
            "check the checkpoint it was loaded from",
        )
