"""The C++ table look-up kernels of ``dbf::sign_matmul``, built on first use.

The environment variable ``DBF_CPU_ISA`` names the instruction set: amx, avx512_vbmi, avx512, avx2, neon or portable; unset,
the fastest one that the processor has for so many tokens is used. All give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dbf_compile.kernels.cpp_build import Library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


library = Library(Path(__file__).with_suffix(".cpp"))
available = library.available


def takes(*tensors: Tensor | None) -> bool:
    """Return whether the kernel takes these tensors: of float32, bfloat16 or float16, or None."""
    return all(tensor.dtype in DTYPES for tensor in tensors if tensor is not None)


def sign_matmul_cpu(
    x: Tensor,
    signs: Tensor,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
    fast: bool = False,
) -> Tensor:
    """Multiply by a sign matrix with additions only: ``y = out_scale ⊙ (signs · (in_scale ⊙ x)) + bias``.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        signs: int32 words [N, ceil(K / 32)].
        in_scale: float32, bfloat16 or float16 [K], or None.
        out_scale: the same [N], or None.
        bias: the same [N], or None.
        dtype: of the result.
        interleaved: whether the words are in the order of :func:`dbf_compile.signs.interleave`, which is faster.
        fast: sum with 16 bits (relative error about 1e-4) instead of 24 (as float32).

    Returns:
        [..., N]; bit-identical for any number of threads, any batch around a token, and any instruction set.
    """
    out = x.new_empty((*x.shape[:-1], signs.shape[0]), dtype=dtype)
    vectors = (None if vector is None else vector.contiguous() for vector in (in_scale, out_scale, bias))
    torch.ops.dbf_native.sign_matmul.out(
        x.contiguous(), signs.contiguous(), *vectors, interleaved=interleaved, fast=fast, out=out
    )
    return out


def prepare_layers_cpu(
    factors: Sequence[Tensor], biases: Sequence[Tensor], interleaved: bool, out: Tensor
) -> Tensor:
    """Write what ``dbf::prepared_layers`` needs of layers to bytes; see ``dbf_compile.ops.prepare_layers``."""
    available()  # loads the operators
    result: Tensor = torch.ops.dbf_native.prepare_layers.out(
        list(factors), list(biases), interleaved=interleaved, out=out
    )
    return result
