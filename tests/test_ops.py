"""The operators: what torch demands of them, gradients, fakes, and errors for inputs that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import (
    FLOAT_DTYPES,
    activations,
    double_binary_factors,
    random_factors,
    random_signs,
    seeds,
    sizes,
)
from torch import Tensor

from dbf_compile import ops
from dbf_compile.errors import KernelInputError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.kernels.sign_matmul import cpu_kernel, reference
from dbf_compile.ops import double_binary_linear
from dbf_compile.signs import interleave, pack_signs
from dbf_compile.testing import assert_close

sign_matmul = torch.ops.dbf.sign_matmul
sign_matmul_transposed = torch.ops.dbf.sign_matmul_transposed

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)
SHAPES = [(3, 33), (2, 0, 33), (33,), (1, 33), (2, 3, 33)]


def words(rows: int = 5, cols: int = 33) -> Tensor:
    return pack_signs(random_signs(rows, cols, 0))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def dense(factors: DoubleBinaryFactors, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer's output in float64, through the dense weight."""
    return torch.nn.functional.linear(
        x.double(), factors.dense(torch.float64), None if bias is None else bias.double()
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_finds_nothing_wrong(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Schema, autograd registration, fakes against the real thing, and tracing with dynamic shapes.
    torch.library.opcheck(sign_matmul, (randn(*shape, dtype=dtype).requires_grad_(), words()))
    g = randn(*shape[:-1], 5, dtype=dtype).requires_grad_()
    torch.library.opcheck(sign_matmul_transposed, (g, words(), 33))
    group = (randn(*shape, dtype=dtype), [words(), words(3)], randn(33))
    torch.library.opcheck(torch.ops.dbf.sign_matmul_group, group)


@pytest.mark.parametrize("interleaved", [False, True])
def test_kernels_of_gpus_get_interleaved_words(interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("dbf_compile.kernels.sign_matmul.triton_kernel")
    # The kernel itself is run in Triton's interpreter elsewhere.
    in_order = lambda *args: reference.sign_matmul(*args[:6], interleaved=True)  # noqa: E731
    monkeypatch.setattr(kernel, "sign_matmul_triton", in_order)
    x, signs = randn(3, 70), words(37, 70)
    stored = interleave(signs) if interleaved else signs
    y = ops._cuda(x, stored, interleaved=interleaved)
    assert torch.equal(y, reference.sign_matmul(x, signs))


@pytest.mark.parametrize("cols", [1, 31, 32, 33])
def test_gradients_in_double_precision(cols: int) -> None:
    x, g = (
        randn(2, cols, dtype=torch.float64).requires_grad_(),
        randn(2, 5, dtype=torch.float64).requires_grad_(),
    )
    signs = words(5, cols)
    assert torch.autograd.gradcheck(lambda x: sign_matmul(x, signs), (x,))
    assert torch.autograd.gradcheck(lambda g: sign_matmul_transposed(g, signs, cols), (g,))
    assert torch.autograd.gradgradcheck(lambda x: sign_matmul(x, signs), (x,))


@given(sizes, sizes, seeds, st.data())
def test_the_gradient_is_the_product_with_the_transposed_signs(
    rows: int, cols: int, seed: int, data: st.DataObject
) -> None:
    signs = random_signs(rows, cols, seed)
    x = data.draw(activations(cols, st.sampled_from(ALL_DTYPES))).requires_grad_()
    y = sign_matmul(x, pack_signs(signs))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    (got,) = torch.autograd.grad(y, x, grad)
    assert got.dtype == x.dtype
    # One sum of N terms in the accumulator's dtype, then one rounding to that of x.
    terms = grad.double().abs().sum(-1, keepdim=True)
    exact = grad.double() @ signs.double()
    rounding = rows * torch.finfo(y.dtype).eps * terms + torch.finfo(x.dtype).eps * exact.abs()
    # Results below the normal numbers of float16 are rounded to its grid.
    assert_close(got, exact, bound=rounding + torch.finfo(x.dtype).smallest_normal)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes_without_data(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    x, g, signs = randn(*shape, dtype=dtype), randn(*shape[:-1], 5, dtype=dtype), words()
    real = sign_matmul(x, signs), sign_matmul_transposed(g, signs, 33)
    if device == "meta":
        fake = (
            sign_matmul(x.to("meta"), signs.to("meta")),
            sign_matmul_transposed(g.to("meta"), signs.to("meta"), 33),
        )
    else:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = sign_matmul(x, signs), sign_matmul_transposed(g, signs, 33)
    for result, expected in zip(fake, real, strict=True):
        properties = (result.shape, result.dtype, result.stride())
        assert properties == (expected.shape, expected.dtype, expected.stride())
        assert result.device.type == ("meta" if device == "meta" else "cpu")


def test_double_precision_is_not_cut_short() -> None:
    x = randn(4, 129, dtype=torch.float64)
    y = sign_matmul(x, words(5, 129))
    assert y.dtype == torch.float64
    assert torch.equal(y, reference.sign_matmul(x, words(5, 129)))


def test_a_machine_without_the_kernel_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(4, 129)
    y = sign_matmul(x, words(5, 129))
    monkeypatch.setattr(cpu_kernel, "available", lambda: False)
    slow = sign_matmul(x, words(5, 129))
    assert torch.equal(slow, reference.sign_matmul(x, words(5, 129)))
    # Two orders of one sum of 129 terms.
    assert_close(y, slow, bound=2 * 129 * 2.0**-24 * x.abs().sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("x", "signs", "message"),
    [
        (torch.ones(2, 33).int(), words(), "activations of dtype torch.int32"),
        (torch.ones(2, 33, dtype=torch.complex64), words(), "activations of dtype torch.complex64"),
        (torch.ones(()), words(), r"shape \(\); allowed: floating point \[\.\.\., K\]"),
        (torch.ones(2, 33), words().long(), "signs of dtype torch.int64"),
        (torch.ones(2, 33), words()[0], "signs of dtype torch.int32 and shape"),
        (torch.ones(2, 65), words(), r"allowed: int32 \[N, 3\]"),
        (torch.ones(2, 32), words(), r"allowed: int32 \[N, 1\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, signs: Tensor, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        sign_matmul(x, signs)
    with pytest.raises(KernelInputError, match=message):
        sign_matmul(x.to("meta"), signs.to("meta"))


def test_inputs_on_two_devices_are_refused() -> None:
    with pytest.raises(KernelInputError, match="activations on meta and factors on cpu; allowed: one device"):
        ops._fake(torch.ones(2, 33, device="meta"), words())


@given(double_binary_factors(), st.sampled_from(ALL_DTYPES), st.booleans(), st.data())
def test_the_layer_is_the_dense_layer(
    factors: DoubleBinaryFactors, dtype: torch.dtype, with_bias: bool, data: st.DataObject
) -> None:
    x = data.draw(activations(factors.in_features, st.just(dtype))).requires_grad_()
    bias = randn(factors.out_features, dtype=dtype).requires_grad_() if with_bias else None
    y = double_binary_linear(x, **factors.tensors(), bias=bias, dtype=torch.float64)
    exact = dense(factors, x, bias)
    k, r = factors.in_features, factors.mid_features
    unit = torch.finfo(reference.accumulator_dtype(dtype)).eps
    # Two sums of K and R terms and four roundings around them, each of the sum of absolute values.
    scales = [getattr(factors, name).double().abs() for name in ("scale_in", "scale_mid", "scale_out")]
    terms = (x.double().abs() @ scales[0])[..., None] * scales[1].sum() * scales[2]
    if bias is not None:
        terms = terms + bias.double().abs()
    assert_close(y, exact, bound=(k + r + 4) * unit * terms)

    # The gradients are those of the dense layer; here the sums have N and R terms.
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = [tensor for tensor in (x, bias) if tensor is not None]
    got, true = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(exact, inputs, grad)
    back = (grad.abs() @ scales[2])[..., None] * scales[1].sum() * scales[0]
    rounding = (factors.out_features + r + 4) * unit * back + torch.finfo(dtype).eps * true[0].double().abs()
    # Both sides end with a rounding to the dtype of x, to its subnormal grid if need be.
    assert_close(got[0].double(), true[0].double(), bound=rounding + torch.finfo(dtype).smallest_normal)
    if bias is not None:
        tokens = max(1, grad[..., 0].numel())
        size = grad.abs().reshape(-1, factors.out_features).sum(0)
        assert_close(
            got[1].double(), true[1].double(), bound=(tokens * unit + 2 * torch.finfo(dtype).eps) * size
        )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("result", ALL_DTYPES)
def test_the_result_has_the_dtype_asked_for(dtype: torch.dtype, result: torch.dtype) -> None:
    factors, x, bias = random_factors(33, 5, 37), randn(8, 33, dtype=dtype), randn(37)
    wide = double_binary_linear(x, **factors.tensors(), bias=bias, dtype=reference.accumulator_dtype(dtype))
    y = double_binary_linear(x, **factors.tensors(), bias=bias, dtype=result)
    assert y.dtype == result
    assert torch.equal(y, wide.to(result))  # rounded once, after the bias


@pytest.mark.parametrize("features", [1, 5, 32, 34])
def test_other_than_in_features_columns_are_refused(features: int) -> None:
    # One column would broadcast against scale_in, 34 columns have as many words as 33.
    with pytest.raises(KernelInputError, match=rf"shape \(2, {features}\) for in_features=33"):
        double_binary_linear(
            torch.ones(2, features), **random_factors(33, 5, 3).tensors(), bias=None, dtype=torch.float32
        )


@pytest.mark.parametrize(
    "x", [torch.ones(2, 33).long(), torch.ones(2, 33, dtype=torch.bool), torch.tensor(1.0)]
)
def test_activations_that_are_no_floating_point_vectors_are_refused(x: Tensor) -> None:
    with pytest.raises(KernelInputError, match=f"activations of dtype {x.dtype}"):
        double_binary_linear(x, **random_factors(33, 5, 3).tensors(), bias=None, dtype=torch.float32)
