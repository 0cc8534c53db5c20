"""The C++ table look-up kernel of ``dbf::sign_matmul``, built on first use."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dbf_compile.errors import BuildError
from dbf_compile.kernels.cpp_build import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def available() -> bool:
    """Build and load the kernel; return False, with one warning, where this machine cannot build or load it."""
    try:
        torch.ops.load_library(build(Path(__file__).with_suffix(".cpp")))
    except (BuildError, OSError) as error:  # OSError: built, but the loader refuses it
        warnings.warn(f"dbf_compile falls back to its slow reference kernel: {error}", stacklevel=2)
        return False
    return True


def sign_matmul_cpu(x: Tensor, signs: Tensor) -> Tensor:
    """Multiply by a sign matrix with additions only: ``y[..., n] = Σ_k signs[n, k] · x[..., k]``.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        signs: int32 words [N, ceil(K / 32)].

    Returns:
        float32 [..., N]; bit-identical for any number of threads and any batch around a token.
    """
    out = x.new_empty((*x.shape[:-1], signs.shape[0]), dtype=torch.float32)
    torch.ops.dbf_native.sign_matmul.out(x.contiguous(), signs.contiguous(), out=out)
    return out
