"""The C++ kernel of the product with a table, against the reference in float64."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.kernels.row_matmul import cpu_kernel
from dbf_compile.kernels.row_matmul.reference import row_matmul
from dbf_compile.rows import ROW_FORMATS, RowFormat, quantize_rows

FORMS = [*ROW_FORMATS.values(), RowFormat(4, 64), RowFormat(6, 16)]
ISAS = ("amx", "avx512_vbmi", "avx512", "avx2", "neon", "portable")


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert cpu_kernel.library.available()


def usable() -> list[str]:
    names = []
    for isa in ISAS:
        os.environ["DBF_CPU_ISA"] = isa
        try:
            cpu_kernel.row_matmul_cpu(torch.ones(1, 4), torch.zeros(1, 2, dtype=torch.int32), None, FORMS[0])
            names.append(isa)
        except RuntimeError as error:
            assert "allowed here" in str(error)
    del os.environ["DBF_CPU_ISA"]
    return names


def by_isa(*arguments: object) -> dict[str, torch.Tensor]:
    results = {}
    for isa in usable():
        os.environ["DBF_CPU_ISA"] = isa
        try:
            results[isa] = cpu_kernel.row_matmul_cpu(*arguments)  # type: ignore[arg-type]
        finally:
            del os.environ["DBF_CPU_ISA"]
    return results


@given(
    form=st.sampled_from(FORMS),
    rows=st.integers(1, 50),
    columns=st.integers(1, 200),
    tokens=st.integers(0, 13),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_all_instruction_sets_give_the_same_bits_near_the_reference(
    form: RowFormat, rows: int, columns: int, tokens: int, size: float
) -> None:
    torch.manual_seed(rows * columns)
    table = quantize_rows(torch.randn(rows, columns), form)
    x = torch.randn(tokens, columns) * size
    first, *others = by_isa(x, table, None, form).values()
    assert all(torch.equal(first, other) for other in others)
    expected = row_matmul(x.double(), table, None, form)
    largest = x.double().abs().amax(-1, keepdim=True) if tokens else 0.0
    assert ((first.double() - expected).abs() <= 1e-5 * columns**0.5 * largest).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_does_not_depend_on_its_batch_or_on_threads(form: RowFormat) -> None:
    table, x = quantize_rows(torch.randn(999, 96), form), torch.randn(70, 96)
    whole = cpu_kernel.row_matmul_cpu(x, table, None, form)
    assert all(torch.equal(cpu_kernel.row_matmul_cpu(x[t], table, None, form), whole[t]) for t in (0, 7, 69))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(cpu_kernel.row_matmul_cpu(x, table, None, form), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_as_in_float32(form: RowFormat, value: float) -> None:
    torch.manual_seed(1)
    table, x = quantize_rows(torch.randn(35, 70), form), torch.randn(3, 70)
    x[1, 5] = value
    y, expected = cpu_kernel.row_matmul_cpu(x, table, None, form), row_matmul(x, table, None, form)
    assert torch.equal(y[1].isnan(), expected[1].isnan())
    assert torch.equal(y[1].nan_to_num(0), expected[1].nan_to_num(0))
    assert torch.allclose(y[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bias_is_added_before_the_result_is_rounded(dtype: torch.dtype) -> None:
    form = FORMS[0]
    table, x, bias = quantize_rows(torch.randn(40, 24), form), torch.randn(2, 24), torch.randn(40).to(dtype)
    wide = cpu_kernel.row_matmul_cpu(x, table, None, form) + bias.float()
    assert torch.equal(cpu_kernel.row_matmul_cpu(x, table, bias, form, dtype), wide.to(dtype))


def test_rows_too_long_for_its_sums_are_left_to_the_reference() -> None:
    assert cpu_kernel.takes(1 << 16) and not cpu_kernel.takes((1 << 16) + 1) and not cpu_kernel.takes(0)
    form = FORMS[0]
    table = quantize_rows(torch.ones(2, 1 << 16), form)
    assert torch.allclose(
        cpu_kernel.row_matmul_cpu(torch.ones(1 << 16), table, None, form), torch.tensor(65536.0)
    )
