"""What bench_factorizer compares: the factorizer's presets, the authors' code, OneBit, rounding to nearest, and HQQ."""

from __future__ import annotations

from typing import Any

import torch
from official_admm import official
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import onebit
from dbf_compile.factors import mid_features_for, stored_bits
from dbf_compile.options import PRESETS

GROUP = 64  # weights that share a scale and a zero, for rounding and HQQ


def error_and_bits(
    method: str, weight: Tensor, importance: Importance | None, bits: float, seed: int = 0
) -> tuple[float, float] | None:
    """Return the weighted error of a method and its stored bits per weight; None where it is not installed."""
    out_features, in_features = weight.shape
    if method == "onebit":
        single = onebit(weight, importance)
        return weighted_error(weight, single, importance), single.bits_per_weight()
    if method[:-1] in ("rtn", "hqq"):
        stored = int(method[-1])
        dense = round_to_nearest(weight, stored) if method.startswith("rtn") else hqq(weight, stored)
        if dense is None:
            return None
        return weighted_error(weight, dense, importance), stored + 2 * 16 / GROUP
    mid_features = mid_features_for(bits, in_features, out_features)
    true_bits = stored_bits(in_features, mid_features, out_features) / weight.numel()
    if method == "official":
        return official(weight, mid_features, importance, seed), true_bits
    config = FactorizerConfig(iterations=PRESETS[method], seed=seed)
    factors = factorize(weight, mid_features, importance, config)
    return weighted_error(weight, factors, importance), true_bits


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return ``weight`` rounded to 2^bits levels between the extremes of every group of 64 weights in a row."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True).half().float(), groups.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    levels = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return (low + levels * step).reshape(weight.shape)


def hqq(weight: Tensor, bits: int, group: int = GROUP) -> Tensor | None:
    """Return ``weight`` quantized by HQQ's package in groups along the rows; None where it is not installed."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        return None
    options = {"nbits": bits, "group_size": group, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    words, meta = Quantizer.quantize(weight, **options)
    return Quantizer.dequantize(words, meta).reshape(weight.shape)


class RoundedProducts(TorchFunctionMode):
    """Rounds the operands of matrix products to nearest, to this many binary digits behind the first; None: as they are."""

    def __init__(self, digits: int | None) -> None:
        super().__init__()
        self._dropped = None if digits is None else 23 - digits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._dropped and getattr(function, "__name__", "") in ("matmul", "mm", "bmm", "__matmul__"):
            args = tuple(self._round(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return function(*args, **(kwargs or {}))

    def _round(self, operand: Tensor) -> Tensor:
        if operand.dtype != torch.float32:
            return operand
        words, dropped = operand.contiguous().view(torch.int32), self._dropped
        half = (1 << (dropped - 1)) - 1 + ((words >> dropped) & 1)  # ties to even
        return ((words + half) & ~((1 << dropped) - 1)).view(torch.float32)
