"""The bit layout: round trip, the layout as drawn, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import random_signs, sign_matrices, sizes
from torch import Tensor

from dbf_compile.errors import SignsError
from dbf_compile.signs import (
    check_words,
    deinterleave,
    interleave,
    pack_signs,
    padding_is_zero,
    slice_columns,
    unpack_signs,
    words_per_row,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64)


@given(sign_matrices(), st.sampled_from(DTYPES))
def test_unpacking_undoes_packing(signs: Tensor, dtype: torch.dtype) -> None:
    words = pack_signs(signs.to(dtype))
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (signs.shape[0], words_per_row(signs.shape[1]))
    again = unpack_signs(words, signs.shape[1], dtype)
    assert again.dtype == dtype
    assert torch.equal(again, signs.to(dtype))


@given(sign_matrices())
def test_every_bit_lies_where_the_docstring_draws_it(signs: Tensor) -> None:
    words = pack_signs(signs)
    for row, col in {(0, 0), (0, signs.shape[1] - 1), (signs.shape[0] - 1, signs.shape[1] // 2)}:
        word = int(words[row, col // 32]) % 2**32
        assert (word >> (col % 32)) & 1 == int(signs[row, col] > 0)


@given(st.integers(0, 70), sizes)
def test_interleaved_words_lie_where_the_docstring_draws_them(rows: int, cols: int) -> None:
    words = torch.arange(rows * cols, dtype=torch.int32).view(rows, cols)
    flat, full = interleave(words).flatten(), rows - rows % 16
    for row in range(rows):
        for word in {0, cols // 2, cols - 1}:
            start = row * cols + word if row >= full else (row // 16 * cols + word) * 16 + row % 16
            assert flat[start] == words[row, word]
    assert interleave(words).shape == words.shape
    assert torch.equal(deinterleave(interleave(words)), words)
    assert torch.equal(interleave(deinterleave(words)), words)


@given(sign_matrices(), st.data())
def test_columns_are_sliced_wherever_they_begin(signs: Tensor, data: st.DataObject) -> None:
    last = data.draw(st.integers(1, signs.shape[1]))
    first = data.draw(st.integers(0, last - 1))
    sliced = slice_columns(pack_signs(signs), first, last)
    assert torch.equal(sliced, pack_signs(signs[:, first:last])) and sliced.is_contiguous()


@pytest.mark.parametrize("cols", range(1, 66))
def test_padding_bits_are_zero_and_any_one_that_is_set_is_noticed(cols: int) -> None:
    signs = random_signs(3, cols, seed=cols)
    words = pack_signs(signs)
    assert padding_is_zero(words, cols)
    for bit in range(cols % 32 or 32, 32):
        spoilt = words.clone()
        spoilt[-1, -1] |= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert not padding_is_zero(spoilt, cols)
        assert torch.equal(unpack_signs(spoilt, cols), signs)  # and yet means nothing


@given(sizes)
def test_words_per_row_is_the_least_number_that_holds_all_columns(cols: int) -> None:
    assert 32 * (words_per_row(cols) - 1) < cols <= 32 * words_per_row(cols)


@given(sign_matrices())
def test_strides_do_not_matter(signs: Tensor) -> None:
    assert torch.equal(pack_signs(signs.T.contiguous().T), pack_signs(signs))


def test_the_layout_by_example() -> None:
    signs = -torch.ones(2, 34)
    signs[0, 0] = signs[0, 31] = signs[1, 1] = signs[1, 33] = 1
    # Column 0 is the least significant bit, column 31 the sign bit of int32, column 33 bit 1 of the next word.
    assert pack_signs(signs).tolist() == [[1 - 2**31, 0], [0b10, 0b10]]


def test_no_rows_and_no_columns() -> None:
    assert pack_signs(torch.ones(0, 40)).shape == (0, 2)
    assert pack_signs(torch.ones(3, 0)).shape == (3, 0)
    assert unpack_signs(torch.zeros(3, 0, dtype=torch.int32), 0).shape == (3, 0)


@pytest.mark.parametrize("entry", [0.0, 0.5, -2.0, float("nan"), float("inf")])
def test_entries_other_than_one_are_refused(entry: float) -> None:
    signs = torch.ones(2, 3)
    signs[1, 2] = entry
    with pytest.raises(SignsError, match="entries other than"):
        pack_signs(signs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_dtypes_that_are_not_real_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(SignsError, match=str(dtype)):
        pack_signs(torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_shapes_other_than_a_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SignsError, match=r"a matrix \[rows, cols\]"):
        pack_signs(torch.ones(shape))


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    ],
    ids=lambda words: f"{words.dtype}{list(words.shape)}",
)
def test_words_that_do_not_fit_are_refused(words: Tensor) -> None:
    with pytest.raises(SignsError, match=r"int32 \[rows, 2\]"):
        check_words(words, 33)
    with pytest.raises(SignsError, match="for 33 columns"):
        unpack_signs(words, 33)
