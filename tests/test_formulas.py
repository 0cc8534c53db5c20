"""Formulas: each against a count of what really is stored or computed, and against what sympy derives from it."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import random_factors, random_signs, sizes

from dbf_compile import formulas
from dbf_compile.factorizer.projection import OneBitFactors
from dbf_compile.factors import mid_features_for, stored_bits
from dbf_compile.formulas import Formula, factored_bits
from dbf_compile.signs import pack_signs

FORMULAS = {name: value for name, value in vars(formulas).items() if isinstance(value, Formula)}
FACTORED = {name: formula for name, formula in FORMULAS.items() if formula.symbols == ("K", "R", "N")}
small = st.integers(1, 9)
K, R, N, b = sympy.symbols("K R N b", integer=True, positive=True)


# What is stored


@given(sizes, sizes, sizes)
def test_factored_bits_are_those_of_real_factors(
    in_features: int, mid_features: int, out_features: int
) -> None:
    factors = random_factors(in_features, mid_features, out_features)
    by_hand = sum(8 * tensor.numel() * tensor.element_size() for tensor in factors.tensors().values())
    assert factored_bits(in_features, mid_features, out_features) == by_hand == factors.bits()
    assert 8 * formulas.factored_bytes(in_features, mid_features, out_features) == by_hand
    words = factors.signs_in.numel() + factors.signs_out.numel()
    assert formulas.sign_words(in_features, mid_features, out_features) == words


@given(sizes, sizes)
def test_onebit_bits_are_those_of_real_factors(in_features: int, out_features: int) -> None:
    factors = OneBitFactors(
        pack_signs(random_signs(out_features, in_features, 0)),
        torch.ones(in_features, dtype=torch.float16),
        torch.ones(out_features, dtype=torch.float16),
    )
    tensors = (factors.signs, factors.scale_in, factors.scale_out)
    by_hand = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
    assert formulas.onebit_bits(in_features, out_features) == by_hand == factors.bits()


@given(sizes, sizes)
def test_dense_bytes_are_those_of_a_half_precision_weight(in_features: int, out_features: int) -> None:
    weight = torch.empty(out_features, in_features, dtype=torch.float16)
    assert formulas.dense_bytes(in_features, out_features) == weight.nbytes
    assert formulas.dense_bits(in_features, out_features) == 8 * weight.nbytes


# What is computed


class Counted:
    """A number that counts the operations on it; a sign only negates."""

    counts: dict[str, int]

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = counts

    def __add__(self, other: Counted) -> Counted:
        self.counts["additions"] += 1
        return self

    def __mul__(self, other: Counted) -> Counted:
        self.counts["multiplications"] += 1
        return self

    def __neg__(self) -> Counted:
        return self


def counted(layer: Callable[[list[Counted], Counted], object], in_features: int) -> dict[str, int]:
    """Return the operations of ``layer`` on one token, for any weight or scale the second argument."""
    counts = {"additions": 0, "multiplications": 0}
    layer([Counted(counts) for _ in range(in_features)], Counted(counts))
    return counts


def sum_of(terms: list[Counted]) -> Counted:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


@given(small, small, small)
def test_operations_of_a_factored_layer(in_features: int, mid_features: int, out_features: int) -> None:
    def layer(x: list[Counted], scale: Counted) -> list[Counted]:
        inner = [value * scale for value in x]
        mid = [sum_of([-value for value in inner]) * scale for _ in range(mid_features)]
        return [sum_of([-value for value in mid]) * scale for _ in range(out_features)]

    counts = counted(layer, in_features)
    sizes = (in_features, mid_features, out_features)
    assert counts["additions"] == formulas.factored_additions(*sizes)
    assert counts["multiplications"] == formulas.factored_multiplications(*sizes)


@given(small, small)
def test_operations_of_a_dense_layer(in_features: int, out_features: int) -> None:
    counts = counted(
        lambda x, weight: [sum_of([value * weight for value in x]) for _ in range(out_features)], in_features
    )
    assert counts["additions"] == formulas.dense_additions(in_features, out_features)
    assert counts["multiplications"] == formulas.dense_multiplications(in_features, out_features)


@given(sizes, sizes, sizes)
def test_a_lookup_takes_four_signs(in_features: int, mid_features: int, out_features: int) -> None:
    factors = random_factors(in_features, mid_features, out_features)
    signs = 8 * (factors.signs_in.nbytes + factors.signs_out.nbytes)
    assert formulas.factored_lookups(in_features, mid_features, out_features) == signs // 4


def looked_up(x: list[Counted], rows: int, counts: dict[str, int]) -> list[Counted]:
    """Return a product with signs as kernels compute it: tables of four columns, padded to whole words."""
    x = x + [x[0]] * (-len(x) % 32)
    tables = []
    for place in range(0, len(x), 4):
        pairs = [
            [one + other, one + -other, -one + other, -one + -other]
            for one, other in (x[place : place + 2], x[place + 2 : place + 4])
        ]
        tables.append([low + high for high in pairs[1] for low in pairs[0]])
    sums = []
    for _ in range(rows):
        counts["lookups"] += len(tables)
        sums.append(sum_of([table[7] for table in tables]))
    return sums


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), small)
def test_operations_of_a_factored_layer_with_look_ups(
    in_features: int, mid_features: int, out_features: int
) -> None:
    counts = {"additions": 0, "multiplications": 0, "lookups": 0}
    x = [Counted(counts) for _ in range(in_features)]
    mid = looked_up(x, mid_features, counts)
    looked_up(mid, out_features, counts)
    sizes = (in_features, mid_features, out_features)
    assert counts["lookups"] == formulas.factored_lookups(*sizes)
    assert counts["additions"] == formulas.lookup_additions(*sizes)
    tables = formulas.lut_additions(in_features) + formulas.lut_additions(mid_features)
    assert counts["additions"] == tables + counts["lookups"] - mid_features - out_features


@given(small, small, small)
def test_operations_of_a_table_of_quantized_rows(groups: int, columns: int, rows: int) -> None:
    def layer(x: list[Counted], code: Counted) -> list[Counted]:
        group_sums = [sum_of([value * code for value in x[place::groups]]) * code for place in range(groups)]
        return [sum_of(group_sums)]

    columns *= groups
    counts = {name: rows * number for name, number in counted(layer, columns).items()}
    assert counts["additions"] == formulas.rows_additions(columns, rows, groups)
    assert counts["multiplications"] == formulas.rows_multiplications(columns, rows, groups)


@given(small, small, small)
def test_operations_of_attention(heads: int, size: int, tokens: int) -> None:
    def layer(query: list[Counted], other: Counted) -> None:
        for _ in range(heads):
            scores = [sum_of([value * other for value in query]) for _ in range(tokens)]
            for _ in range(size):
                sum_of([score * other for score in scores])

    counts = counted(layer, size)
    assert counts["additions"] == formulas.attention_additions(heads, size, tokens)
    assert counts["multiplications"] == formulas.attention_multiplications(heads, size, tokens)


# What holds for all of them


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@settings(max_examples=20)
@given(data=st.data())
def test_values_are_whole_numbers_equal_to_the_expression(formula: Formula, data: st.DataObject) -> None:
    # 2^60 is beyond what a float holds exactly.
    values = [data.draw(st.integers(1, 2**60)) for _ in formula.symbols]
    value = formula(*values)
    assert type(value) is int
    names = [sympy.Symbol(name, integer=True, positive=True) for name in formula.symbols]
    assert value == formula.expression.subs(dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("formula", FACTORED.values(), ids=FACTORED)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_a_factored_layer_costs_more_with_every_middle_feature(
    formula: Formula, k: int, r: int, n: int
) -> None:
    assert formula(k, r + 1, n) > formula(k, r, n)


@given(sizes, sizes, sizes)
def test_stored_bits_are_the_formula(in_features: int, mid_features: int, out_features: int) -> None:
    sizes = (in_features, mid_features, out_features)
    assert stored_bits(*sizes) == factored_bits(*sizes)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
def test_one_more_middle_feature_costs_a_row_and_sometimes_a_word_a_row(n: int, k: int, r: int) -> None:
    step = stored_bits(k, r + 1, n) - stored_bits(k, r, n)
    assert step == 32 * math.ceil(k / 32) + 16 + (32 * n if r % 32 == 0 else 0)


# What follows by algebra


def test_the_bits_of_whole_words_are_linear_in_the_middle_dimension() -> None:
    words = factored_bits.expression.subs({K: 32 * K, R: 32 * R})
    cost = sympy.expand(words.subs({K: K / 32, R: R / 32}))
    assert sympy.expand(cost - (R * (K + N) + 16 * (K + R + N))) == 0
    assert sympy.diff(cost, R) == K + N + 16  # of one more middle feature, on average


def test_the_budget_of_a_layer_is_what_its_bits_can_buy() -> None:
    cost = R * (K + N) + 16 * (K + R + N)
    (inverse,) = sympy.solve(sympy.Eq(cost, b * N * K), R)
    assert sympy.simplify(inverse - (b * K * N - 16 * (K + N)) / (K + N + 16)) == 0
    for k, n, bits in itertools.product((1536, 11008), (384, 4096), (1, sympy.Rational(3, 2), 2, 4)):
        exact = inverse.subs({N: n, K: k, b: bits})
        # Whole words of signs_out are paid for: at most 31 features are lost to them.
        assert 0 <= exact - mid_features_for(float(bits), k, n) < 32


def test_a_formula_is_no_reason_to_import_sympy() -> None:
    code = "import sys, dbf_compile.formulas as f; sys.exit(any(m == 'sympy' for m in sys.modules))"
    before = "import sys; sys.modules.setdefault('dbf_compile', type(sys)('dbf_compile')); "
    before += f"sys.modules['dbf_compile'].__path__ = {list(__import__('dbf_compile').__path__)!r}; "
    assert subprocess.run([sys.executable, "-c", before + code], check=False).returncode == 0
