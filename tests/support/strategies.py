"""Hypothesis strategies: sizes that do not divide evenly, sign matrices, factors, activations.

Contents come from a drawn seed, not entry by entry: sizes shrink to the smallest that fails, drawing stays cheap.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from dbf_compile.factors import SCALE_DTYPES, DoubleBinaryFactors
from dbf_compile.signs import pack_signs

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# 1, primes, and both neighbours of multiples of the word size.
sizes = st.sampled_from((1, 2, 3, 5, 7, 13, 31, 32, 33, 37, 63, 64, 65, 95, 97, 127, 128, 129))
seeds = st.integers(0, 2**32 - 1)
float_dtypes = st.sampled_from(FLOAT_DTYPES)
scale_dtypes = st.sampled_from(SCALE_DTYPES)


def random_signs(rows: int, cols: int, seed: int) -> Tensor:
    """Return a float32 matrix [rows, cols] of ±1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, cols), generator=generator).float() * 2 - 1


def random_scale(size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return scales [size] of either sign, well inside the range of float16."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_factors(
    in_features: int, mid_features: int, out_features: int, seed: int = 0, dtype: torch.dtype = torch.float16
) -> DoubleBinaryFactors:
    """Return factors of these sizes, made of random signs and scales."""
    return DoubleBinaryFactors(
        pack_signs(random_signs(mid_features, in_features, seed)),
        pack_signs(random_signs(out_features, mid_features, seed + 1)),
        random_scale(in_features, seed + 2, dtype),
        random_scale(mid_features, seed + 3, dtype),
        random_scale(out_features, seed + 4, dtype),
    )


def random_factors_like(weight: Tensor, mid_features: int, seed: int = 0) -> DoubleBinaryFactors:
    """Return random factors in the place of a weight, whose products are somewhat larger than those of the weight."""
    factors = random_factors(weight.shape[1], mid_features, weight.shape[0], seed)
    scale = math.sqrt(3) * weight.float().std() / factors.dense(torch.float32).std()
    return replace(factors, scale_out=(factors.scale_out * scale).half())


def sign_matrices(
    rows: st.SearchStrategy[int] = sizes, cols: st.SearchStrategy[int] = sizes
) -> st.SearchStrategy[Tensor]:
    """Draw float32 matrices [rows, cols] of ±1."""
    return st.builds(random_signs, rows, cols, seeds)


def double_binary_factors(
    in_features: st.SearchStrategy[int] = sizes,
    mid_features: st.SearchStrategy[int] = sizes,
    out_features: st.SearchStrategy[int] = sizes,
    dtypes: st.SearchStrategy[torch.dtype] = scale_dtypes,
) -> st.SearchStrategy[DoubleBinaryFactors]:
    """Draw factors of odd sizes, with scales of every dtype allowed."""
    return st.builds(random_factors, in_features, mid_features, out_features, seeds, dtypes)


@st.composite
def activations(
    draw: st.DrawFn,
    features: int,
    dtypes: st.SearchStrategy[torch.dtype] = float_dtypes,
) -> Tensor:
    """Draw activations [..., features] with none to three leading dimensions, some of them empty."""
    leading = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.randn(*leading, features, generator=generator).to(draw(dtypes))
