"""How many tokens go to which kernel on a GPU: the one table of such limits.

    tokens      activations of 16 bits                           of float32
    1 … 16      decode: look-up tables, additions only           the same
    17 … 128    prefill: tensor cores, signs in registers        prefill, by the bf16x3 split
    129 …       dense: dequantized signs, the library's matmul   prefill, by the bf16x3 split

"Of 16 bits" are activations of a 16-bit model: they, or the result, are bfloat16 or float16.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

DECODE_TOKENS = 16
"""Up to this many tokens are summed as exactly as float32 does; more go through tensor cores."""

FUSED_TOKENS = 128
"""Up to this many tokens meet signs in registers; more share a dense matrix of signs."""

_NARROW = (torch.bfloat16, torch.float16)


class Regime(Enum):
    """A way to multiply by signs on a GPU."""

    DECODE = "look-up tables"
    PREFILL = "tensor cores, signs in registers"
    DENSE = "tensor cores, a dense matrix of signs"


def is_decode(tokens: Any) -> bool:
    """Return whether a product of this many tokens is known to go to the decode kernel; a symbolic number is not."""
    return isinstance(tokens, int) and tokens <= DECODE_TOKENS


def is_beyond_decode(tokens: Any) -> bool:
    """Return whether a product of this many tokens is known to go through tensor cores; a symbolic number is not."""
    return isinstance(tokens, int) and tokens > DECODE_TOKENS


def choose_regime(
    tokens: Any, operands: int, at_most: Callable[[Any, int], bool | None] = operator.le
) -> Regime | None:
    """Return how a product is computed.

    Args:
        tokens: M; may be symbolic.
        operands: 16-bit numbers that an activation is split into, see :func:`operand_count`.
        at_most: compares tokens with a limit; None where both may happen.

    Returns:
        The regime; None where the number of tokens does not decide.
    """
    few, fused = at_most(tokens, DECODE_TOKENS), at_most(tokens, FUSED_TOKENS)
    if few is None or fused is None:
        return None
    if few:
        return Regime.DECODE
    return Regime.PREFILL if fused or operands > 1 else Regime.DENSE


def operand_dtype(x: torch.dtype, result: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which tensor cores get activations of dtype ``x`` for a result of dtype ``result``.

    A 16-bit model keeps its dtype, as its dense layers do: that of the activations, else that of the result.
    """
    if x in _NARROW:
        return x
    return result if result in _NARROW else torch.bfloat16


def operand_count(x: torch.dtype, result: torch.dtype | None, fast: bool = False) -> int:
    """Return into how many 16-bit numbers an activation is split: 1 in a 16-bit model, else 3, or 2 for fast sums."""
    if x in _NARROW or result in _NARROW:
        return 1
    return 2 if fast else 3
