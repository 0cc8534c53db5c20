"""assert_close: what passes, what does not, and what the report shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import FLOAT_DTYPES, activations, sizes
from torch import Tensor

from dbf_compile.testing import assert_close

NAN, INF = float("nan"), float("inf")


@given(sizes.flatmap(activations))
def test_a_result_is_close_to_itself(x: Tensor) -> None:
    assert_close(x, x.double(), rtol=0.0)
    assert_close(x, x, bound=0.0)


@given(sizes.flatmap(activations).filter(lambda x: x.numel() > 0), st.data())
def test_one_entry_beyond_the_bound_is_found(x: Tensor, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, x.numel() - 1))
    spoilt = x.double()
    spoilt.view(-1)[place] += 0.5
    assert_close(spoilt, x.double(), bound=0.5 + 1e-9)  # the sum rounds in float64
    where = [int(i) for i in torch.unravel_index(torch.tensor(place), x.shape)]
    with pytest.raises(AssertionError) as caught:
        assert_close(spoilt, x.double(), bound=0.5 - 1e-9)
    assert f"1 of {x.numel()} entries differ" in str(caught.value)
    assert f"worst      at {where}" in str(caught.value)


def test_the_tolerance_is_relative_to_the_largest_entry() -> None:
    reference = torch.tensor([100.0, 0.0])
    assert_close(torch.tensor([100.0, 0.5]), reference, rtol=0.005)
    with pytest.raises(AssertionError, match=r"allowed 0\.4"):
        assert_close(torch.tensor([100.0, 0.5]), reference, rtol=0.004)


def test_the_worst_entry_is_the_one_furthest_beyond_its_bound() -> None:
    with pytest.raises(AssertionError, match=r"2 of 2 entries(.|\n)*worst      at \[1\]"):
        assert_close(torch.tensor([1.0, 0.5]), torch.zeros(2), bound=torch.tensor([0.9, 0.0]))


def test_a_bound_may_differ_by_entry() -> None:
    assert_close(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]]), bound=torch.tensor([0.5, 0.0]))
    with pytest.raises(AssertionError, match=r"worst      at \[0, 1\]"):
        assert_close(torch.tensor([[1.5, 2.5]]), torch.tensor([[1.0, 2.0]]), bound=torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize(
    ("value", "reference"), [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (INF, 1.0), (1.0, INF), (INF, -INF)]
)
def test_nan_and_infinity_are_never_close_to_anything_else(value: float, reference: float) -> None:
    with pytest.raises(AssertionError, match="1 of 2 entries"):
        assert_close(torch.tensor([value, 3.0]), torch.tensor([reference, 3.0]), rtol=1.0)


def test_equal_infinities_are_close() -> None:
    assert_close(torch.tensor([INF, -INF, 1.0]), torch.tensor([INF, -INF, 1.0]), rtol=0.0)


def test_a_bound_of_nan_allows_nothing() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.ones(2), torch.ones(2), bound=NAN)


def test_the_report_names_shapes_dtypes_and_counts() -> None:
    actual = torch.tensor([[1.0, NAN, INF]], dtype=torch.bfloat16)
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, torch.ones(1, 3, dtype=torch.float64), rtol=1e-2, what="hidden state")
    for part in (
        "hidden state: 2 of 3 entries differ too much",
        "actual     torch.bfloat16 [1, 3] on cpu, 1 NaN, 1 infinite",
        "reference  torch.float64 [1, 3] on cpu, 0 NaN, 0 infinite",
        "absolute error inf",
        "relative to max |reference| inf",
    ):
        assert part in str(caught.value)


def test_other_shapes_are_refused_even_where_they_broadcast() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(torch.ones(1, 3), torch.ones(3), rtol=1.0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_reference_must_not_be_coarser_than_the_result(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="less precise"):
        assert_close(torch.ones(3).double(), torch.ones(3, dtype=dtype), rtol=1.0)
    with pytest.raises(AssertionError, match="less precise"):
        assert_close(torch.ones(3).half(), torch.ones(3).bfloat16(), rtol=1.0)


def test_exactly_one_tolerance_is_needed() -> None:
    with pytest.raises(TypeError, match="exactly one"):
        assert_close(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match="exactly one"):
        assert_close(torch.ones(3), torch.ones(3), rtol=0.0, bound=0.0)
