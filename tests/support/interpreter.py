"""What Triton's interpreter needs to run our kernels; for programs that run with TRITON_INTERPRET set."""

from __future__ import annotations

from typing import Any


def let_dot_widen_bfloat16() -> None:
    """Let ``tl.dot``, which takes the bits of bfloat16 for integers, widen them first; until this process ends."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        operands = [self.create_fp_ext(v, float32) if v.dtype == bfloat16 else v for v in (a, b)]
        return dot(self, *operands, *rest)

    InterpreterBuilder.create_dot = widened
