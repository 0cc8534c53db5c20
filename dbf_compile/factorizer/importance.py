"""Importance: how much each row and column of a weight counts, alone (diagonal) or together (whole matrices).

    J = tr(L · E · R · Eᵀ)        E [N, K] = W − Ŵ,  L ≈ E[δ δᵀ] [N, N],  R ≈ E[x xᵀ] [K, K],  δ = ∂loss/∂y

J is the change of the loss to second order, if the curvature of the layer is a Kronecker product. The importances of
the paper are the diagonals of L and R; whole matrices say how features act together. A vector stands for a diagonal
everywhere below, so that one type holds diagonal, whole-input and Kronecker curvature.

Source: diagonals as in Boža and Macko (arXiv 2505.11076); shrinking towards the mean as in NanoQuant; powers
below 1 of the curvature's spectrum as in published replications of it.

Shape letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbf_compile.errors import OptionError, WeightError

# Added to feature weights, as in the authors' notebooks: a feature that was never active still gets a fitting scale.
FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class Importance:
    """Second moments around one linear layer; where one is None, all features count alike.

    A constant factor in a moment has no effect on factors. Entries may be 0.

    Args:
        input_second_moment: E[x²], floating point [K], or E[x xᵀ] [K, K].
        output_grad_second_moment: E[(∂loss/∂y)²], floating point [N], or E[δ δᵀ] [N, N].

    Raises:
        WeightError: a moment is no non-empty floating-point vector or symmetric matrix, or it has a NaN or infinite
            entry, or a negative one in the vector or on the diagonal.
    """

    input_second_moment: Tensor | None = None
    output_grad_second_moment: Tensor | None = None

    def __post_init__(self) -> None:
        for name, moment in self.moments().items():
            _check_moment(name, moment)

    def __repr__(self) -> str:
        sizes = (
            f"{name}={None if moment is None else list(moment.shape)}"
            for name, moment in self.moments().items()
        )
        return f"Importance({', '.join(sizes)})"

    def feature_weights(
        self, out_features: int, in_features: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return the weights of rows and columns: ``√(moment / mean(moment)) + 1e-8``.

        Of a matrix the diagonal counts. A moment that is None or all zeros gives ones.

        Args:
            out_features: N of the weight.
            in_features: K of the weight.
            device: device of the result.

        Returns:
            Weights of the rows [N] and of the columns [K], float32, positive.

        Raises:
            WeightError: the length of a moment is not that of the weight's side.
        """
        rows = _feature_weights("output_grad_second_moment", self.output_grad_second_moment, out_features)
        columns = _feature_weights("input_second_moment", self.input_second_moment, in_features)
        return rows.to(device), columns.to(device)

    def metrics(self, device: torch.device | str = "cpu") -> tuple[Tensor | None, Tensor | None]:
        """Return the metrics that couple rows, and columns, of a weight whose features have been weighted.

        ``metric = diag(moment)^(-1/2) · moment · diag(moment)^(-1/2)``, with ones on the diagonal

        Args:
            device: device of the result.

        Returns:
            Metrics of the rows [N, N] and of the columns [K, K], float32; None, the identity, for a moment that is no
            matrix.
        """
        rows, columns = self.output_grad_second_moment, self.input_second_moment
        return _metric(rows, device), _metric(columns, device)

    def diagonal(self) -> Importance:
        """Return the importance with each matrix replaced by its diagonal."""
        return self._map(diagonal_of)

    def shrunk(self, amount: float) -> Importance:
        """Return the importance shrunk towards uniform: ``(1 - amount) · moment + amount · mean(diag(moment)) · I``.

        Moments of few batches over-rate the features that were active in them.

        Args:
            amount: 0 (nothing changes) to 1 (all features count alike); 0.2 is a usual value.

        Raises:
            OptionError: ``amount`` lies outside of 0 to 1.
        """
        if not 0 <= amount <= 1:
            raise OptionError(f"amount={amount!r}", "a number from 0 to 1", "0.2 is a usual value")

        def shrink(moment: Tensor) -> Tensor:
            if moment.dim() == 1:
                return torch.lerp(moment, moment.mean().expand_as(moment), amount)
            mean = moment.diagonal().mean()
            shrunk = (1 - amount) * moment
            shrunk.diagonal().add_(amount * mean)
            return shrunk

        return self._map(shrink)

    def tempered(self, power: float = 0.5) -> Importance:
        """Return the importance with a flatter spectrum: ``λ → λ^power · Σ λ / Σ λ^power``, which keeps the trace.

        λ are the eigenvalues of a matrix, or the entries of a vector. Where errors are as large as those of one or two
        bits, the curvature over-rates its largest directions; the square root does best in published replications.

        Args:
            power: 0 to 1; 1 changes nothing, 0 gives a multiple of the identity.

        Raises:
            OptionError: ``power`` lies outside of 0 to 1.
        """
        if not 0 <= power <= 1:
            raise OptionError(f"power={power!r}", "a number from 0 to 1", "0.5 is a usual value")

        def flatten(values: Tensor) -> Tensor:
            # Clamp: a fractional power of a slightly negative eigenvalue is NaN.
            spectrum = values.clamp_min(0)
            powers = spectrum**power
            return powers * (spectrum.sum() / powers.sum()) if bool(spectrum.any()) else spectrum

        def temper(moment: Tensor) -> Tensor:
            if moment.dim() == 1:
                return flatten(moment.double()).to(moment.dtype)
            values, vectors = torch.linalg.eigh(moment.double())
            tempered: Tensor = (vectors * flatten(values)) @ vectors.mT
            return ((tempered + tempered.mT) / 2).to(moment.dtype)

        return self._map(temper)

    def moments(self) -> dict[str, Tensor | None]:
        """Return the two moments by name, in the order of the constructor."""
        return {
            "input_second_moment": self.input_second_moment,
            "output_grad_second_moment": self.output_grad_second_moment,
        }

    def _map(self, change: Callable[[Tensor], Tensor]) -> Importance:
        return Importance(*(m if m is None else change(m.detach()) for m in self.moments().values()))

    @staticmethod
    def stack(items: Sequence[Importance], rows: Sequence[int]) -> Importance:
        """Return the importance of weights that read the same input, stacked along their rows.

        The input moment is the mean of the input moments. Output moments are concatenated, matrices along the
        diagonal; rows without one count as the mean of all others. A moment that no item has stays None.

        Args:
            items: one importance per weight.
            rows: N of each weight.

        Raises:
            WeightError: there are no items, ``rows`` has another length, or the lengths of moments do not fit.
        """
        if not items or len(items) != len(rows):
            raise WeightError(
                f"{len(items)} importances for {len(rows)} weights",
                "one importance per weight, at least one",
                "pass Importance() for a weight without one",
            )
        inputs = [item.input_second_moment for item in items if item.input_second_moment is not None]
        if len({moment.shape for moment in inputs}) > 1:
            raise WeightError(
                f"input_second_moment of lengths {[list(moment.shape) for moment in inputs]} for stacked weights",
                "one length: stacked weights read the same input",
                "stack only layers with equal in_features, calibrated in one way",
            )
        outputs = [item.output_grad_second_moment for item in items]
        for moment, count in zip(outputs, rows, strict=True):
            _check_length("output_grad_second_moment", moment, count)
        return Importance(
            torch.stack([moment.double() for moment in inputs]).mean(0).float() if inputs else None,
            _stacked_outputs(outputs, rows),
        )


def _stacked_outputs(moments: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor | None:
    present = [moment.double() for moment in moments if moment is not None]
    if not present:
        return None
    mean = torch.cat([diagonal_of(moment) for moment in present]).mean()
    stacked = [
        mean.expand(count) if moment is None else moment.double()
        for moment, count in zip(moments, rows, strict=True)
    ]
    if any(moment.dim() == 2 for moment in present):
        blocks = [moment if moment.dim() == 2 else moment.diag() for moment in stacked]
        matrix: Tensor = torch.block_diag(*blocks)
        return matrix.float()
    return torch.cat(stacked).float()


def _feature_weights(name: str, moment: Tensor | None, length: int) -> Tensor:
    _check_length(name, moment, length)
    if moment is None or not bool(diagonal_of(moment).any()):
        return torch.ones(length, device="cpu" if moment is None else moment.device, dtype=torch.float32)
    exact = diagonal_of(moment).double()
    exact = exact / exact.amax()  # so that the mean cannot overflow
    return ((exact / exact.mean()).sqrt() + FLOOR).float()


def diagonal_of(moment: Tensor) -> Tensor:
    """Return the second moments of single features: the diagonal of a matrix, or the vector itself."""
    return (moment.diagonal() if moment.dim() == 2 else moment).detach()


def _metric(moment: Tensor | None, device: torch.device | str) -> Tensor | None:
    if moment is None or moment.dim() == 1:
        return None
    exact = moment.detach().double()
    size = exact.diagonal().sqrt()
    # A feature that was never active is coupled to none. Neither is one so faint that its square underflowed, even where
    # its products with others did not.
    inverse = torch.where(size > 0, 1 / size, 0.0)
    metric = (exact * torch.outer(inverse, inverse)).clamp_(-1.0, 1.0)
    metric.diagonal().fill_(1.0)
    return metric.float().to(device)


def _check_length(name: str, moment: Tensor | None, length: int) -> None:
    if moment is not None and moment.shape[0] != length:
        raise WeightError(
            f"{name} of length {moment.shape[0]} for a weight with {length} of these features",
            f"length {length}",
            "take weight and importance from the same layer",
        )


def _check_moment(name: str, moment: object) -> None:
    if moment is None:
        return
    if (
        not isinstance(moment, Tensor)
        or not moment.is_floating_point()
        or moment.dim() not in (1, 2)
        or moment.numel() == 0
        or moment.shape[0] != moment.shape[-1]
    ):
        got = (
            f"dtype {moment.dtype} and shape {tuple(moment.shape)}"
            if isinstance(moment, Tensor)
            else f"type {type(moment).__name__}"
        )
        raise WeightError(
            f"{name} of {got}",
            "a non-empty floating-point vector or square matrix",
            "pass one second moment per feature, or one per pair of features",
        )
    if not bool(torch.isfinite(moment).all()) or bool((diagonal_of(moment) < 0).any()):
        raise WeightError(
            f"{name} with negative, NaN or infinite entries",
            "finite second moments of 0 or more",
            "calibrate again, in float32 where activations overflow",
        )
    if moment.dim() == 2 and float((moment - moment.mT).abs().amax()) > 1e-3 * float(moment.abs().amax()):
        raise WeightError(f"{name} that is not symmetric", "a symmetric matrix", "pass E[x xᵀ]")
