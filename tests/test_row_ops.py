"""``dbf::row_matmul``: derivatives, batches, dtypes, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp, vmap

import dbf_compile.row_ops  # noqa: F401
from dbf_compile.errors import KernelInputError
from dbf_compile.rows import ROW_FORMATS, RowFormat, dequantize_rows, quantize_rows

FORMS = list(ROW_FORMATS.values())


def case(form: RowFormat, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    table = quantize_rows(torch.randn(19, 37), form)
    return torch.randn(2, 3, 37).to(dtype), table, torch.randn(19).to(dtype), dequantize_rows(table, 37, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derivatives_are_those_of_the_dense_matrix(form: RowFormat) -> None:
    x, table, bias, dense = case(form, torch.float64)
    x, bias = x.requires_grad_(), bias.requires_grad_()

    def product(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.dbf.row_matmul(x, table, form.bits, form.group, bias)

    assert torch.allclose(product(x, bias), x @ dense.double().T + bias)
    assert torch.autograd.gradcheck(product, (x, bias), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(product, (x, bias))
    _, tangent = jvp(product, (x, bias), (x, bias))
    assert torch.allclose(tangent, product(x, bias))


def test_batches_are_as_one_by_one() -> None:
    form = FORMS[0]
    x, table, bias, _ = case(form)
    one = lambda x: torch.ops.dbf.row_matmul(x, table, form.bits, form.group, bias)  # noqa: E731
    assert torch.equal(vmap(one)(x), one(x))
    tables = torch.stack([table, table.flip(0)])
    many = vmap(lambda rows: torch.ops.dbf.row_matmul(x, rows, form.bits, form.group))(tables)
    assert torch.equal(many[1], torch.ops.dbf.row_matmul(x, tables[1], form.bits, form.group))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    form = FORMS[0]
    x, table, bias, dense = case(form, dtype)
    y = torch.ops.dbf.row_matmul(x, table, form.bits, form.group, bias, dtype)
    assert y.dtype == dtype
    expected = x.double() @ dense.double().T + bias.double()
    assert (y.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
    assert torch.ops.dbf.row_matmul(x, table, form.bits, form.group).dtype == torch.float32


def test_an_operator_as_torch_wants_it() -> None:
    form = FORMS[2]
    x, table, bias, _ = case(form)
    torch.library.opcheck(torch.ops.dbf.row_matmul.default, (x, table, form.bits, form.group, bias))


def test_what_does_not_fit_is_refused() -> None:
    form = FORMS[0]
    x, table, bias, _ = case(form)
    call = torch.ops.dbf.row_matmul
    for arguments, message in (
        ((x.int(), table, 8, 0), "activations of dtype"),
        ((x[..., :30], table, 8, 0), "a table of dtype .* for activations"),
        ((x, table, 4, 32), "a table of dtype"),
        ((x, table.float(), 8, 0), "a table of dtype"),
        ((x, table, 8, 0, bias[:3]), "bias of shape"),
        ((x.to("meta"), table, 8, 0), "one device"),
    ):
        with pytest.raises(KernelInputError, match=message):
            call(*arguments)
