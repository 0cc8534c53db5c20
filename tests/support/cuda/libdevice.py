"""Functions of NVIDIA's libdevice that Inductor's kernels call and Triton's interpreter lacks."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def isnan(x):  # type: ignore[no-untyped-def]
    return x != x


@triton.jit
def isinf(x):  # type: ignore[no-untyped-def]
    return (x == float("inf")) | (x == float("-inf"))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 1 - 2 / (1 + tl.exp(2 * x))


def __getattr__(name: str) -> Any:
    # Looked up at the call: while a kernel runs, the interpreter replaces these functions by its own.
    return getattr(triton.language.math, name)
