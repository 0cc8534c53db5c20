"""DoubleBinaryFactors: a weight as two sign matrices and three scale vectors.

    W  ≈  diag(scale_out) · signs_out · diag(scale_mid) · signs_in · diag(scale_in)

Shape letters: K in_features, R mid_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbf_compile.errors import DBFError, FactorsError
from dbf_compile.signs import check_words, padding_is_zero, unpack_signs, words_per_row

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCALE_BITS = 16  # the factorizer stores scales in half precision
SIGN_NAMES = ("signs_in", "signs_out")
FIRST_STAGE = ("signs_in", "scale_in", "scale_mid")  # what layers that read one input may have in common
TENSOR_NAMES = (*SIGN_NAMES, "scale_in", "scale_mid", "scale_out")


@dataclass(frozen=True, eq=False)
class DoubleBinaryFactors:
    """The five tensors of a double binary factorization; checked when made, never changed.

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
        """Return the weight the factors stand for, shape [N, K], computed in ``dtype``."""
        outer = unpack_signs(self.signs_out, self.mid_features, dtype) * self.scale_mid.to(dtype)
        inner = unpack_signs(self.signs_in, self.in_features, dtype) * self.scale_in.to(dtype)
        return self.scale_out.to(dtype)[:, None] * (outer @ inner)

    def bits(self) -> int:
        """Return the stored bits: all words, padding included, and all scales."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def bits_per_weight(self) -> float:
        """Return ``bits() / (N · K)``."""
        return self.bits() / (self.in_features * self.out_features)

    def to(
        self, device: torch.device | str | None = None, scale_dtype: torch.dtype | None = None
    ) -> DoubleBinaryFactors:
        """Return the factors on ``device`` with scales of ``scale_dtype``; ``None`` keeps what is there."""
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
    def stack(parts: Sequence[DoubleBinaryFactors]) -> DoubleBinaryFactors:
        """Return the factors of the stacked rows of ``parts``; undoes :meth:`split`.

        Raises:
            FactorsError: the parts do not share the tensors of their first stage.
        """
        first = parts[0]
        if any(getattr(part, name) is not getattr(first, name) for part in parts for name in FIRST_STAGE):
            raise FactorsError(
                "parts with first stages of their own",
                "parts that came out of one split()",
                "factor the stacked weight instead",
            )
        if len(parts) == 1:
            return first
        return DoubleBinaryFactors(
            first.signs_in,
            torch.cat([part.signs_out for part in parts]),
            first.scale_in,
            first.scale_mid,
            torch.cat([part.scale_out for part in parts]),
        )

    def split(self, out_features: Sequence[int]) -> Iterator[DoubleBinaryFactors]:
        """Yield the factors of consecutive groups of rows; the first stage is shared, not copied.

        Args:
            out_features: rows of each part; their sum is N.

        Raises:
            FactorsError: the parts do not add up to N.
        """
        if sum(out_features) != self.out_features:
            raise FactorsError(
                f"parts of {list(out_features)} rows for {self.out_features} out_features",
                f"parts that add up to {self.out_features}",
                "pass the out_features of the stacked layers",
            )
        start = 0
        for rows in out_features:
            part = slice(start, start + rows)
            yield DoubleBinaryFactors(
                self.signs_in, self.signs_out[part], self.scale_in, self.scale_mid, self.scale_out[part]
            )
            start += rows


def move_factors(
    factors: Mapping[str, DoubleBinaryFactors], devices: Mapping[str, torch.device]
) -> dict[str, DoubleBinaryFactors]:
    """Return factors by name, each on its device; tensors that several share are moved once and stay shared."""
    moved: dict[tuple[int, torch.device], Tensor] = {}

    def move(tensor: Tensor, device: torch.device) -> Tensor:
        key = id(tensor), device
        if key not in moved:
            moved[key] = tensor.to(device)
        return moved[key]

    return {
        name: DoubleBinaryFactors(*(move(tensor, devices[name]) for tensor in made.tensors().values()))
        for name, made in factors.items()
    }


def stored_bits(in_features: int, mid_features: int, out_features: int) -> int:
    """Return the bits of factors of these sizes with 16-bit scales.

    ``32 · (R · ceil(K / 32) + N · ceil(R / 32)) + 16 · (K + R + N)``
    """
    words = mid_features * words_per_row(in_features) + out_features * words_per_row(mid_features)
    return 32 * words + SCALE_BITS * (in_features + mid_features + out_features)


def mid_features_for(bits_per_weight: float, in_features: int, out_features: int) -> int:
    """Return the largest R whose stored bits, scales and padding counted, do not exceed the target.

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
            "build the factors with dbf_compile.factorize or load them from a checkpoint",
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
            "padding bits of 0",
            "pack with dbf_compile.signs.pack_signs",
        )
