"""The steps of an update in plain torch: on GPUs, and what the C++ kernel is compared with.

A factor is a batch of matrices ``point [B, M, Q]`` with the rank-one magnitude of their projection, ``rows [B, M]`` times
``columns [B, Q]``:

    primal = sign(point) ⊙ (rows · columnsᵀ)        dual = point − primal
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12  # floor on norms


def primal(point: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the projection ``sign(point) ⊙ (rows · columnsᵀ)`` [B, M, Q]."""
    return torch.mul(rows[..., None], columns[..., None, :]).copysign_(point)


def anchor(point: Tensor, rows: Tensor, columns: Tensor, leak: float, out: Tensor) -> Tensor:
    """Write ``(primal − leak · dual)ᵀ`` to ``out``, and return it.

    Args:
        point, rows, columns: the factor, float32 [B, M, Q], [B, M], [B, Q].
        leak: a number.
        out: float32 or bfloat16 [B, Q, M].
    """
    projected = primal(point, rows, columns)
    return out.copy_(projected.mul_(1 + leak).sub_(point, alpha=leak).mT)


def rest(target: Tensor, product: Tensor, share: Tensor) -> Tensor:
    """Make ``target − share · product`` of ``product``, and return it.

    Args:
        target: float32 [B, Q, P].
        product: float32 or bfloat16 [B, Q, P].
        share: float32 [B].
    """
    return product.copy_(target - share[:, None, None] * product)


def advance(
    point: Tensor,
    rows: Tensor,
    columns: Tensor,
    step: Tensor,
    share: Tensor,
    relaxation: float,
    leak: float,
    keep_columns: bool,
) -> None:
    """Move a factor, in place, and fit its magnitude with one power iteration.

        point'  = (1 − relaxation + relaxation · share) · primal + leak · (1 − relaxation · share) · dual + relaxation · step
        u       = |point'| · columns / ‖ … ‖,   v = |point'|ᵀ · u
        rows'   = ‖v‖ · u,  columns' = v / ‖v‖

    Args:
        point, rows, columns: the factor, float32 [B, M, Q], [B, M], [B, Q]; the columns of norm 1 or zeros.
        step: float32 or bfloat16 [B, M, Q].
        share: float32 [B].
        relaxation, leak: numbers.
        keep_columns: leave the columns; ``rows' = |point'| · columns``.
    """
    share = share[:, None, None]
    of_primal, of_dual = 1 - relaxation + relaxation * share, leak * (1 - relaxation * share)
    projected = primal(point, rows, columns)
    point.mul_(of_dual).addcmul_(projected, of_primal - of_dual).add_(step, alpha=relaxation)
    magnitude = torch.abs(point, out=projected)
    sums = magnitude @ columns[..., None]
    if keep_columns:
        rows.copy_(sums[..., 0])
        return
    unit = sums / torch.linalg.vector_norm(sums, dim=-2, keepdim=True).clamp_min(TINY)
    other = magnitude.mT @ unit
    size = torch.linalg.vector_norm(other, dim=-2, keepdim=True)
    rows.copy_((size * unit)[..., 0])
    columns.copy_((other / size.clamp_min(TINY))[..., 0])


def average(point: Tensor, rows: Tensor, columns: Tensor, averaging: float, basis: Tensor) -> None:
    """Average a basis with the factor's primal, its rows scaled to norm 1; in place.

    ``basis' = averaging · basis + (1 − averaging) · sign(point) ⊙ (rows / (rows + tiny) · columnsᵀ)``

    Args:
        point, rows, columns: the factor, float32 [B, M, Q], [B, M], [B, Q].
        averaging: a number.
        basis: float32 [B, M, Q].
    """
    unit = primal(point, rows / (rows + TINY), columns)
    torch.lerp(unit, basis, averaging, out=basis)
