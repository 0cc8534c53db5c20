"""Patches of Triton's interpreter that our kernels need; for programs that run with TRITON_INTERPRET set."""

from __future__ import annotations

from typing import Any


def compute_bfloat16_as_devices_do() -> None:
    """Patch bfloat16 in the interpreter until this process ends: conversions truncate, and ``tl.dot`` reads its bits as integers."""
    import torch
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != float32 or to.scalar != bfloat16:
            return cast(self, source, to)
        bits = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, bfloat16)

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        operands = [self.create_fp_ext(v, float32) if v.dtype == bfloat16 else v for v in (a, b)]
        return dot(self, *operands, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounded, widened


def patch_the_language_once() -> None:
    """Patch the interpreter until this process ends: it looks through ``triton.language`` once, not at every call of a function.

    That was a third of its time.
    """
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, set()
    nothing_to_restore = interpreter._LangPatchScope()

    def patch_once(function: Any) -> Any:
        modules = (interpreter.tl, interpreter.tl.core)
        visible = frozenset(id(value) for value in function.__globals__.values() if value in modules)
        if visible not in seen:
            patch(function)
            seen.add(visible)
        return nothing_to_restore

    interpreter._patch_lang = patch_once


def add_without_checks() -> None:
    """Patch the interpreter until this process ends: sums of integers are computed once, not in 64 bits as well, for a check.

    A device does not check them, and shapes in tests are small. It was a quarter of the interpreter's time.
    """
    import dataclasses

    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


def reduce_halves() -> None:
    """Patch reductions by a function until this process ends: combine halves, as devices do, not number by number."""
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    one_by_one = ReduceOps.generic_reduce

    def reduced(self: Any, values: Any) -> Any:
        if self.axis is None or values[0].handle.data.ndim < 2:
            return one_by_one(self, values)
        dtypes = [value.dtype for value in values]
        arrays = [np.moveaxis(value.handle.data, self.axis, 0) for value in values]
        while (length := len(arrays[0])) > 1:  # a power of two, as all sizes of tiles
            halves = [
                *(array[: length // 2] for array in arrays),
                *(array[length // 2 :] for array in arrays),
            ]
            combined = self.combine_fn.fn(*map(self.to_tensor, halves, [*dtypes, *dtypes]))
            parts = combined if isinstance(combined, tuple) else (combined,)
            arrays = [part.handle.data for part in parts]
        arrays = [array[0] for array in arrays]
        if self.keep_dims:
            arrays = [np.expand_dims(array, self.axis) for array in arrays]
        return list(map(self.to_tensor, arrays, dtypes))

    ReduceOps.generic_reduce = reduced
