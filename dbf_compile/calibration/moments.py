"""Running second moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moment:
    """A running second moment: the sum of squares, or of outer products, in float64 and how many were summed."""

    whole: bool = False
    clip: float | None = None
    total: Tensor | None = None
    positions: int = 0
    limit: float = 0.0

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., features]; of positions that ``mask`` [...] leaves out nothing."""
        rows = values.detach()
        if mask is not None and rows.shape[:-1] == mask.shape:
            rows = rows[mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        if self.clip is not None:
            rows = self._clipped(rows)
        # float64 throughout: squares of small float16 gradients vanish in less.
        if self.whole:
            exact = rows.double()
            added = exact.mT @ exact
        else:
            added = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
        self.total = added if self.total is None else self.total + added.to(self.total.device)
        self.positions += rows.shape[0]

    def _clipped(self, rows: Tensor) -> Tensor:
        """Scale long rows down to the largest quantile of norms that any batch had so far."""
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if norms.numel() == 0 or not bool(torch.isfinite(norms).all()):
            return rows  # the importance made of it says which layer it is
        assert self.clip is not None
        place = min(norms.numel() - 1, int(self.clip * norms.numel()))
        limit = float(norms.sort().values[place])
        if limit > self.limit:
            if self.total is not None and self.limit > 0:
                # What was summed under a lower limit would have counted for more under this one.
                self.total = self.total * (limit / self.limit) ** 2
            self.limit = limit
        shares: Tensor = self.limit / norms.clamp_min(self.limit or 1.0)
        return rows * shares[:, None].to(rows.dtype)

    def mean(self) -> Tensor | None:
        """Return the moment of all positions in float64, or None where nothing was taken in.

        What lies off the diagonal of a matrix is multiplied by n / (n + d), n positions and d features: it is noise to
        about that share, and without the factor directions that n < d positions leave out would count nothing at all.
        """
        if self.total is None:
            return None
        mean = self.total / max(1, self.positions)
        if self.whole:
            diagonal = mean.diagonal().clone()
            mean *= self.positions / (self.positions + len(diagonal))
            mean.diagonal().copy_(diagonal)
        return mean
