"""Tables of quantized rows: what is written is read, and is near."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.rows import (
    ROW_FORMATS,
    RowFormat,
    dequantize_rows,
    quantize_rows,
    read_rows,
    scales_of,
)

FORMS = [*ROW_FORMATS.values(), RowFormat(4, 64), RowFormat(6, 16)]
SIZES = st.integers(1, 40)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(form=st.sampled_from(FORMS), rows=SIZES, columns=st.integers(1, 150), seed=st.integers(0, 99))
def test_a_table_is_as_near_as_half_a_step(form: RowFormat, rows: int, columns: int, seed: int) -> None:
    weight = matrix(rows, columns, seed)
    table = quantize_rows(weight, form)
    assert table.dtype == torch.int32 and table.shape == (rows, form.words(columns))
    dense = dequantize_rows(table, columns, form)
    scale = scales_of(table, columns, form).abs().repeat_interleave(form.group or columns, 1)[:, :columns]
    if not form.group:  # with fewer bits the largest may be cut off where that is nearer as a whole
        assert ((dense - weight).abs() <= scale * 0.501).all()
    assert (dense - weight).norm() <= weight.norm() * {8: 0.01, 6: 0.04, 4: 0.16}[form.bits]


@given(form=st.sampled_from(FORMS), rows=SIZES, columns=st.integers(1, 99))
def test_rows_are_read_where_they_lie(form: RowFormat, rows: int, columns: int) -> None:
    table = quantize_rows(matrix(rows, columns), form)
    ids = torch.arange(rows).flip(0).view(1, rows)
    dense = dequantize_rows(table, columns, form)
    for kind in (torch.int64, torch.int32):
        assert torch.equal(read_rows(table, ids.to(kind), columns, form), dense[ids])
    assert read_rows(table, ids[:, :0], columns, form, torch.bfloat16).shape == (1, 0, columns)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_table_of_its_own_values_is_exact(form: RowFormat) -> None:
    dense = dequantize_rows(quantize_rows(matrix(20, 70), form), 70, form)
    again = dequantize_rows(quantize_rows(dense, form), 70, form)
    assert (
        (again - dense).norm() <= 1e-2 * dense.norm()
        if form.group
        else torch.allclose(again, dense, rtol=1e-5)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_and_extremes(form: RowFormat) -> None:
    weight = torch.zeros(3, 65)
    weight[1] = 1e-30
    weight[2, 5] = -1e30
    dense = dequantize_rows(quantize_rows(weight, form), 65, form)
    assert (dense[0] == 0).all() and dense.isfinite().all()
    assert dense[2, 5] == pytest.approx(-1e30, rel=0.01) and (dense[2, 6:] == 0).all()


def test_the_search_of_scales_gains() -> None:
    weight, form = matrix(64, 64), ROW_FORMATS["int4"]
    groups = weight.view(64, 2, 32)
    plain = groups.abs().amax(-1, keepdim=True) / 7
    rounded = ((groups / plain).round() * plain).view(64, 64)
    dense = dequantize_rows(quantize_rows(weight, form), 64, form)
    assert (dense - weight).norm() < 0.9 * (rounded - weight).norm()


@pytest.mark.parametrize("rows", [16, 17])
def test_other_ids_are_refused(rows: int) -> None:
    form = ROW_FORMATS["int8"]
    table = quantize_rows(matrix(rows, 12), form)
    for value in (-1, rows, -rows, 10**6):
        with pytest.raises(IndexError):
            read_rows(table, torch.tensor([0, value]), 12, form)


def test_bits_count_scales_and_padding() -> None:
    assert 32 * ROW_FORMATS["int8"].words(576) / 576 == 8 + 32 / 576
    assert 32 * ROW_FORMATS["int4"].words(576) / 576 == 4.5
    assert 32 * ROW_FORMATS["int6"].words(576) / 576 == 6 + 32 * 5 / 576  # nine scales in five words
