"""The operator of attention over a cache: shapes without data, and sizes that do not fit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dbf_compile.attention_ops  # noqa: F401
from dbf_compile.errors import KernelInputError


def tensors(dtype=torch.float32, L=6):
    return (
        torch.ones(2, 4, 3, 8, dtype=dtype),
        torch.ones(2, 2, 8, L, dtype=dtype),
        torch.ones(2, 2, 6, 5, dtype=dtype),
        torch.arange(3).expand(2, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_known_without_data(dtype):
    y = torch.ops.dbf.cached_attention(*tensors(dtype), 0.5)
    with FakeTensorMode() as mode:
        fake = torch.ops.dbf.cached_attention(*(mode.from_tensor(item) for item in tensors(dtype)), 0.5)
    assert (y.shape, y.dtype) == (fake.shape, fake.dtype) == ((2, 3, 4, 5), dtype)
    assert torch.equal(y, torch.ones_like(y))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(KernelInputError, match="check the cache"):
        torch.ops.dbf.cached_attention(*tensors(L=7), 0.5)


@pytest.mark.parametrize("argument", range(3))
def test_derivatives_of_both_modes_are_those_of_the_reference(argument):
    generator = torch.Generator().manual_seed(0)
    *shapes, positions = tensors(torch.float64)
    inputs = [torch.randn(item.shape, generator=generator, dtype=item.dtype) for item in shapes]

    def attention(value):
        replaced = [*inputs[:argument], value, *inputs[argument + 1 :]]
        return torch.ops.dbf.cached_attention(*replaced, positions, 0.5, 2, 3.0)

    value = inputs[argument].requires_grad_()
    assert torch.autograd.gradcheck(attention, (value,), check_forward_ad=True)
    assert torch.allclose(attention(value), attention(value.detach()))
    _, tangent = torch.func.jvp(attention, (value.detach(),), (value.detach(),))
    _, expected = torch.autograd.functional.jvp(attention, value, value)
    assert torch.allclose(tangent, expected)
