"""The running second moment of what flows through a layer: E[x²] of every feature, or E[x xᵀ]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ENOUGH = 64  # batches for a vector
_AT_A_TIME = 2**16  # numbers that stay in a core's cache in float64


@dataclass
class Moment:
    """A running second moment of rows x [features].

    Args:
        whole: sum outer products, for a matrix; else squares, for a vector.
        clip: quantile of a batch's row norms, 0 to 1; longer rows are scaled down to it. None to take rows as they are.

    Attributes:
        total: the sum, float64 [features] or [features, features]; None before the first :meth:`add`.
        positions: number of rows summed.
        limit: norm to which rows are scaled down.
    """

    whole: bool = False
    clip: float | None = None
    total: Tensor | None = None
    positions: int = 0
    limit: float = 0.0

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Accumulate values [..., features], skipping positions where ``mask`` [...] is False."""
        rows = values.detach()
        if mask is not None and rows.shape[:-1] == mask.shape:
            rows = rows[mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        if self.clip is not None:
            rows = self._clipped(rows)
        # In float64: squares of small float16 gradients would underflow.
        if self.whole:
            exact = rows.double()
            added = exact.mT @ exact
        else:
            added = rows.new_zeros(rows.shape[-1], dtype=torch.float64)
            few = max(1, _AT_A_TIME // max(1, rows.shape[-1])) if rows.device.type == "cpu" else len(rows)
            for part in rows.split(max(1, few)):
                added += part.double().square().sum(0)
        self.total = added if self.total is None else self.total + added.to(self.total.device)
        self.positions += rows.shape[0]

    def _clipped(self, rows: Tensor) -> Tensor:
        """Scale long rows down to the largest ``clip`` quantile of norms among all batches so far."""
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if norms.numel() == 0 or not bool(torch.isfinite(norms).all()):
            return rows  # Importance refuses them; its error names the layer
        assert self.clip is not None
        place = min(norms.numel() - 1, int(self.clip * norms.numel()))
        limit = float(norms.sort().values[place])
        if limit > self.limit:
            if self.total is not None and self.limit > 0:
                # Approximation: as if all rows so far had been scaled down to the old limit.
                self.total = self.total * (limit / self.limit) ** 2
            self.limit = limit
        shares: Tensor = self.limit / norms.clamp_min(self.limit or 1.0)
        return rows * shares[:, None].to(rows.dtype)

    def mean(self) -> Tensor | None:
        """Return the mean over all positions in float64, or None if nothing was accumulated.

        Off the diagonal a matrix is multiplied by n / (n + d), with n positions and d features. About d / (n + d) of what
        stands there is noise, and without the factor, directions that n < d positions never showed would count nothing.
        """
        if self.total is None:
            return None
        mean = self.total / max(1, self.positions)
        if self.whole:
            diagonal = mean.diagonal().clone()
            mean *= self.positions / (self.positions + len(diagonal))
            mean.diagonal().copy_(diagonal)
        return mean


def measuring(batches: int, whole: bool) -> list[int]:
    """Return which of so many batches measure moments that are measured again for every block.

    Those of a matrix take all. Those of a vector take 64, as more change little; they are drawn at random, since kinds of text may
    stand in blocks or in turns.
    """
    if whole or batches <= _ENOUGH:
        return list(range(batches))
    drawn = torch.randperm(batches, generator=torch.Generator().manual_seed(0))[:_ENOUGH]
    return sorted(drawn.tolist())
