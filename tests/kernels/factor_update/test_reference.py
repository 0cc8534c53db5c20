"""The steps of an ADMM update in plain torch: what their formulas say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.factorizer.projection import rank_one
from dbf_compile.kernels.factor_update import reference

SEEDS = st.integers(0, 1000)
SIDES = st.integers(1, 9)


def factor(batch, height, width, seed):
    """Return a point and its magnitude, the columns of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(batch, height, width, generator=generator)
    rows = torch.rand(batch, height, generator=generator)
    columns = torch.rand(batch, width, generator=generator) + 0.1
    return point, rows, torch.nn.functional.normalize(columns, dim=-1)


@given(st.integers(1, 3), SIDES, SIDES, SEEDS)
def test_an_anchor_is_primal_less_a_part_of_the_dual(batch, height, width, seed):
    point, rows, columns = factor(batch, height, width, seed)
    primal = point.sign() * rows[..., None] * columns[:, None]
    out = torch.full_like(point.mT, torch.nan)
    assert reference.anchor(point, rows, columns, 0.9, out) is out
    torch.testing.assert_close(out.mT, primal - 0.9 * (point - primal))


@given(st.integers(1, 3), SIDES, SIDES, SEEDS)
def test_a_rest_takes_the_place_of_a_product(batch, height, width, seed):
    target, product = factor(batch, height, width, seed)[0], factor(batch, height, width, seed + 1)[0]
    share = torch.rand(batch)
    expected = target - share[:, None, None] * product
    assert reference.rest(target, product, share) is product
    torch.testing.assert_close(product, expected)


@given(st.integers(1, 3), SIDES, SIDES, SEEDS, st.floats(0.5, 1.5), st.booleans())
def test_an_advance_relaxes_and_fits_the_magnitude(batch, height, width, seed, relaxation, keep):
    point, rows, columns = factor(batch, height, width, seed)
    step, share, leak = factor(batch, height, width, seed + 1)[0], torch.rand(batch), 0.9
    primal = reference.primal(point, rows, columns)
    dual = point - primal
    solution = share[:, None, None] * (primal - leak * dual) + step
    expected = relaxation * solution + (1 - relaxation) * primal + leak * dual
    before = columns.clone()
    reference.advance(point, rows, columns, step, share, relaxation, leak, keep)
    torch.testing.assert_close(point, expected, rtol=1e-4, atol=1e-5)  # float32, terms of other orders
    if keep:
        assert torch.equal(columns, before)
        torch.testing.assert_close(rows, (point.abs() @ columns[..., None])[..., 0])
    else:
        for mine, theirs in zip((rows, columns), rank_one(point.abs(), 1, before), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 3), SIDES, SIDES, SEEDS, st.floats(-0.2, 0.6))
def test_an_average_is_of_the_basis_and_rows_of_norm_1(batch, height, width, seed, averaging):
    point, rows, columns = factor(batch, height, width, seed)
    basis = factor(batch, height, width, seed + 1)[0]
    unit = torch.nn.functional.normalize(reference.primal(point, rows.clamp_min(0.1), columns), dim=-1)
    expected = averaging * basis + (1 - averaging) * unit
    reference.average(point, rows.clamp_min(0.1), columns, averaging, basis)
    torch.testing.assert_close(basis, expected)


@pytest.mark.parametrize("keep", [False, True])
def test_a_factor_of_zeros_stays_finite(keep):
    point, rows, columns = torch.zeros(1, 3, 4), torch.zeros(1, 3), torch.full((1, 4), 0.5)
    reference.advance(point, rows, columns, torch.zeros(1, 3, 4), torch.ones(1), 1.2, 0.9, keep)
    reference.average(point, rows, columns, 0.3, basis := torch.zeros(1, 3, 4))
    assert not any(bool(tensor[:, :3].any()) for tensor in (point, rows, basis))
