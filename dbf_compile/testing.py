"""assert_close: compare a result with a more precise reference, and report where they differ."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    actual: Tensor,
    reference: Tensor,
    *,
    rtol: float | None = None,
    bound: Tensor | float | None = None,
    what: str = "result",
) -> None:
    """Check that a result is within its tolerance of the reference.

    ``|actual - reference| <= rtol · max |reference|``, or ``<= bound`` entry by entry

    ``rtol`` is relative to the largest entry of the output, not to each entry: the terms of a sum may cancel.

    Args:
        actual: the result under test, of any floating-point dtype.
        reference: the same shape, from arithmetic at least as precise.
        rtol: allowed error, relative to the largest finite entry of ``reference``.
        bound: allowed absolute error: a number, or a tensor that broadcasts to the result.
        what: name of the result in the report.

    Raises:
        AssertionError: an entry differs by more than its tolerance or is NaN, shapes differ, or the reference has a less
            precise dtype than the result.
        TypeError: both or neither of ``rtol`` and ``bound`` are given.
    """
    if (rtol is None) == (bound is None):
        raise TypeError("assert_close takes exactly one of rtol and bound")
    sides = f"  actual     {_describe(actual)}\n  reference  {_describe(reference)}"
    if actual.shape != reference.shape:
        raise AssertionError(f"{what}: shapes differ\n{sides}")
    if torch.promote_types(actual.dtype, reference.dtype) != reference.dtype:
        raise AssertionError(f"{what}: the reference is less precise than the result\n{sides}")
    got, true = (tensor.detach().cpu().double() for tensor in (actual, reference))
    finite = true[true.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    allowed = rtol * size if rtol is not None else bound
    limit = torch.as_tensor(allowed, dtype=torch.float64).detach().cpu().expand(true.shape)
    error = torch.where(got == true, 0.0, (got - true).abs())  # equal infinities differ by 0, not by NaN
    wrong = ~(error <= limit)  # NaN compares false: never close
    if not wrong.any():
        return
    excess = torch.where(wrong, (error - limit).nan_to_num(nan=torch.inf), -torch.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), true.shape))
    largest = error.nan_to_num(nan=torch.inf).max().item()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} entries differ too much\n{sides}\n"
        f"  worst      at {list(worst)}: got {got[worst]:.9g}, reference {true[worst]:.9g}, "
        f"difference {error[worst]:.3g}, allowed {limit[worst]:.3g}\n"
        f"  largest    absolute error {largest:.3g}, "
        f"relative to max |reference| {largest / size if size else torch.inf:.3g}"
    )


def _describe(tensor: Tensor) -> str:
    counts = f"{int(tensor.isnan().sum())} NaN, {int(tensor.isinf().sum())} infinite"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, {counts}"
