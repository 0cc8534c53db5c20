"""The C++ kernel of ``dbf::cached_attention``, built on first use."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dbf_compile.kernels.cpp_build import Library

library = Library(Path(__file__).with_suffix(".cpp"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(dtype: torch.dtype) -> bool:
    """Return whether the kernel takes activations of a dtype, and can be built here."""
    return dtype in DTYPES and library.available()


def cached_attention_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """Attend to the keys up to the position of each query; see ``dbf::cached_attention``.

    Returns:
        [B, T, H, V] of the dtype of ``q``; bit-identical for any number of threads and any queries beside one.
    """
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[-1]))
    tensors = [tensor.contiguous() for tensor in (q, keys, values, positions)]
    torch.ops.dbf_native.cached_attention.out(*tensors, scale=scale, window=window, cap=cap, out=out)
    return out
