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


def reduce_whole_slices() -> None:
    """Patch reductions by a function until this process ends: combine whole rows at once, not number by number."""
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    one_by_one = ReduceOps.generic_reduce

    def reduced(self: Any, values: Any) -> Any:
        if self.axis is None or values[0].handle.data.ndim < 2:
            return one_by_one(self, values)
        dtypes = [value.dtype for value in values]
        slices = zip(*(np.moveaxis(value.handle.data, self.axis, 0) for value in values), strict=True)
        wrapped = (tuple(map(self.to_tensor, slice_, dtypes)) for slice_ in slices)
        total = next(wrapped)
        for following in wrapped:
            combined = self.combine_fn.fn(*total, *following)
            total = combined if isinstance(combined, tuple) else (combined,)
        arrays = [value.handle.data for value in total]
        if self.keep_dims:
            arrays = [np.expand_dims(array, self.axis) for array in arrays]
        return list(map(self.to_tensor, arrays, dtypes))

    ReduceOps.generic_reduce = reduced
