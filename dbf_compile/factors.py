"""DoubleBinaryFactors: a weight as two sign matrices and three scale vectors.

    W  ≈  diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

Shape letters: K in_features, R mid_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dbf_compile.errors import DBFError, FactorsError
from dbf_compile.formulas import factored_bits
from dbf_compile.signs import check_words, padding_is_zero, unpack_signs, words_per_row

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIGN_NAMES = ("signs_in", "signs_out")
FIRST_STAGE = ("signs_in", "scale_in", "scale_mid")  # layers that read one input may share these
TENSOR_NAMES = (*SIGN_NAMES, "scale_in", "scale_mid", "scale_out")


@dataclass(frozen=True, eq=False)
class DoubleBinaryFactors:
    """The five tensors of a double binary factorization; immutable, and checked by the constructor.

    ``W[n, k] ≈ scale_out[n] · Σ_r signs_out[n, r] · scale_mid[r] · signs_in[r, k] · scale_in[k]``

    Args:
        signs_in: int32 words [R, ceil(K / 32)], layout of :mod:`dbf_compile.signs`.
        signs_out: int32 words [N, ceil(R / 32)].
        scale_in: float16, bfloat16 or float32 [K].
        scale_mid: the same dtype [R].
        scale_out: the same dtype [N].

    Raises:
        FactorsError: sizes, dtypes or devices disagree, a scale is NaN or infinite, padding bits are set.
    """

    signs_in: Tensor
    signs_out: Tensor
    scale_in: Tensor
    scale_mid: Tensor
    scale_out: Tensor

    def __post_init__(self) -> None:
        for name in ("scale_in", "scale_mid", "scale_out"):
            _check_scale(name, getattr(self, name))
        dtypes = {self.scale_in.dtype, self.scale_mid.dtype, self.scale_out.dtype}
        devices = {tensor.device for tensor in self.tensors().values()}
        if len(dtypes) > 1 or len(devices) > 1:
            raise FactorsError(
                f"scales of dtypes {sorted(map(str, dtypes))} on devices {sorted(map(str, devices))}",
                "one dtype and one device for all",
                "use DoubleBinaryFactors.to(...)",
            )
        _check_signs("signs_in", self.signs_in, rows=self.mid_features, cols=self.in_features)
        _check_signs("signs_out", self.signs_out, rows=self.out_features, cols=self.mid_features)

    @property
    def in_features(self) -> int:
        """K, the number of columns of the weight."""
        return self.scale_in.numel()

    @property
    def mid_features(self) -> int:
        """R, the size of the middle dimension."""
        return self.scale_mid.numel()

    @property
    def out_features(self) -> int:
        """N, the number of rows of the weight."""
        return self.scale_out.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return the five tensors by name, in the order of the constructor."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the factors stand for, computed in ``dtype``."""
        outer = unpack_signs(self.signs_out, self.mid_features, dtype) * self.scale_mid.to(dtype)
        inner = unpack_signs(self.signs_in, self.in_features, dtype) * self.scale_in.to(dtype)
        return self.scale_out.to(dtype)[:, None] * (outer @ inner)

    def bits(self) -> int:
        """Return the number of stored bits: all words of signs, padding included, and all scales."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def bits_per_weight(self) -> float:
        """Return ``bits() / (N · K)``."""
        return self.bits() / (self.in_features * self.out_features)

    def to(
        self, device: torch.device | str | None = None, scale_dtype: torch.dtype | None = None
    ) -> DoubleBinaryFactors:
        """Return the factors on ``device`` with scales of ``scale_dtype``; None changes nothing.

        Raises:
            FactorsError: ``scale_dtype`` is no dtype for scales, or a scale overflows in it.
        """
        device = self.scale_in.device if device is None else device
        dtype = self.scale_in.dtype if scale_dtype is None else scale_dtype
        return DoubleBinaryFactors(
            self.signs_in.to(device),
            self.signs_out.to(device),
            self.scale_in.to(device, dtype),
            self.scale_mid.to(device, dtype),
            self.scale_out.to(device, dtype),
        )

    @staticmethod
    def stack(groups: Sequence[DoubleBinaryFactors]) -> DoubleBinaryFactors:
        """Return the factors of the stacked rows of ``groups``; the inverse of :meth:`split`.

        Raises:
            FactorsError: the groups do not share the tensors of their first stage.
        """
        first = groups[0]
        if any(getattr(group, name) is not getattr(first, name) for group in groups for name in FIRST_STAGE):
            raise FactorsError(
                "groups of rows with first stages of their own",
                "groups that one split() returned",
                "factor the stacked weight instead",
            )
        if len(groups) == 1:
            return first
        return DoubleBinaryFactors(
            first.signs_in,
            torch.cat([group.signs_out for group in groups]),
            first.scale_in,
            first.scale_mid,
            torch.cat([group.scale_out for group in groups]),
        )

    def split(self, out_features: Sequence[int]) -> Iterator[DoubleBinaryFactors]:
        """Yield the factors of consecutive groups of rows; they share the first stage without a copy.

        Args:
            out_features: number of rows of each group; their sum is N.

        Raises:
            FactorsError: the groups do not add up to N.
        """
        if sum(out_features) != self.out_features:
            raise FactorsError(
                f"groups of {list(out_features)} rows for {self.out_features} out_features",
                f"groups that add up to {self.out_features}",
                "pass the out_features of the stacked layers",
            )
        start = 0
        for count in out_features:
            rows = slice(start, start + count)
            yield DoubleBinaryFactors(
                self.signs_in, self.signs_out[rows], self.scale_in, self.scale_mid, self.scale_out[rows]
            )
            start += count


def factor_shapes(in_features: int, mid_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the five tensors by name, in the order of :class:`DoubleBinaryFactors`."""
    return {
        "signs_in": (mid_features, words_per_row(in_features)),
        "signs_out": (out_features, words_per_row(mid_features)),
        "scale_in": (in_features,),
        "scale_mid": (mid_features,),
        "scale_out": (out_features,),
    }


def factor_dtypes(scale_dtype: torch.dtype = torch.float16) -> dict[str, torch.dtype]:
    """Return the dtypes of the five tensors by name; the factorizer makes scales in float16."""
    return {name: torch.int32 if name in SIGN_NAMES else scale_dtype for name in TENSOR_NAMES}


def move_factors(
    factors: Mapping[str, DoubleBinaryFactors], devices: Mapping[str, torch.device]
) -> dict[str, DoubleBinaryFactors]:
    """Return the factors of several layers, each on its device; shared tensors are moved once and stay shared.

    Args:
        factors: by layer name.
        devices: by layer name, for every layer of ``factors``.
    """
    moved: dict[tuple[int, torch.device], Tensor] = {}

    def move(tensor: Tensor, device: torch.device) -> Tensor:
        key = id(tensor), device
        if key not in moved:
            moved[key] = tensor.to(device)
        return moved[key]

    return {
        name: DoubleBinaryFactors(*(move(tensor, devices[name]) for tensor in layer.tensors().values()))
        for name, layer in factors.items()
    }


@lru_cache(maxsize=2**16)  # budgets ask for the same sizes many times
def stored_bits(in_features: int, mid_features: int, out_features: int) -> int:
    """Return the number of stored bits of factors of these sizes with 16-bit scales.

    ``32 · (R · ceil(K / 32) + N · ceil(R / 32)) + 16 · (K + R + N)``
    """
    return factored_bits(in_features, mid_features, out_features)


def mid_features_for(bits_per_weight: float, in_features: int, out_features: int) -> int:
    """Return the largest R whose stored bits, scales and padding counted, fit ``bits_per_weight``.

    Returns 0 where not even one middle feature fits.
    """
    budget = bits_per_weight * in_features * out_features
    low, high = 0, int(budget // out_features) + 1
    while low < high:  # stored_bits grows with R: bisect
        middle = (low + high + 1) // 2
        if stored_bits(in_features, middle, out_features) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _check_scale(name: str, scale: Tensor) -> None:
    if scale.dim() != 1 or scale.numel() == 0 or scale.dtype not in SCALE_DTYPES:
        raise FactorsError(
            f"{name} of dtype {scale.dtype} and shape {tuple(scale.shape)}",
            f"a non-empty vector of {', '.join(str(dtype) for dtype in SCALE_DTYPES)}",
            "make factors with dbf_compile.factorize, or load them from a checkpoint",
        )
    if scale.device.type != "meta" and not bool(torch.isfinite(scale).all()):
        raise FactorsError(
            f"{name} with NaN or infinite entries",
            "finite scales",
            "factor the weight again; a float16 scale overflows above 65504",
        )


def _check_signs(name: str, words: Tensor, rows: int, cols: int) -> None:
    try:
        check_words(words, cols)
    except DBFError as error:
        raise FactorsError(f"{name}: {error.got}", error.allowed, error.do) from None
    if words.shape[0] != rows:
        raise FactorsError(
            f"{name} with {words.shape[0]} rows for a scale of {rows} entries",
            f"{rows} rows",
            "take signs and scales from one factorization",
        )
    if words.device.type != "meta" and not padding_is_zero(words, cols):
        raise FactorsError(
            f"{name} with bits set behind column {cols}",
            "0 in all padding bits",
            "pack with dbf_compile.signs.pack_signs",
        )
