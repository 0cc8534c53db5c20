"""The reference against the definition, written out entry by entry."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import FLOAT_DTYPES, activations, random_signs, seeds, sizes

from dbf_compile.kernels.sign_matmul.reference import accumulator_dtype, sign_matmul, sign_matmul_transposed
from dbf_compile.signs import pack_signs
from dbf_compile.testing import assert_close

dtypes = st.sampled_from((*FLOAT_DTYPES, torch.float64))


@given(sizes, sizes, seeds, dtypes, st.data())
def test_sign_matmul_is_the_sum_of_signed_activations(
    rows: int, cols: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    signs, x = random_signs(rows, cols, seed), data.draw(activations(cols, st.just(dtype)))
    y = sign_matmul(x, pack_signs(signs))
    assert y.dtype == accumulator_dtype(dtype)
    exact = torch.where(signs > 0, x.double()[..., None, :], -x.double()[..., None, :]).sum(-1)
    # A sum of K terms in any order is off by at most K roundings of Σ|terms|; the exact side rounds as well.
    unit = torch.finfo(y.dtype).eps
    assert_close(y.double(), exact, bound=cols * unit * x.double().abs().sum(-1, keepdim=True))


@given(sizes, sizes, seeds, dtypes, st.data())
def test_transposed_is_the_product_with_the_transposed_signs(
    rows: int, cols: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    signs, g = random_signs(rows, cols, seed), data.draw(activations(rows, st.just(dtype)))
    out = sign_matmul_transposed(g, pack_signs(signs), cols)
    assert out.dtype == accumulator_dtype(dtype) and out.shape == (*g.shape[:-1], cols)
    unit = torch.finfo(out.dtype).eps  # as above, with N terms
    transposed = sign_matmul(g.double(), pack_signs(signs.T))
    assert_close(out.double(), transposed, bound=rows * unit * g.double().abs().sum(-1, keepdim=True))


@given(sizes, sizes, seeds)
def test_unit_vectors_read_off_the_signs(rows: int, cols: int, seed: int) -> None:
    signs = random_signs(rows, cols, seed)
    assert torch.equal(sign_matmul(torch.eye(cols), pack_signs(signs)), signs.T)
    assert torch.equal(sign_matmul_transposed(torch.eye(rows), pack_signs(signs), cols), signs)
