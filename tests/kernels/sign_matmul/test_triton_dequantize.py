"""The settings and the grid of the dequantizing kernel; what it computes is in ``test_triton_kernel.py``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from dbf_compile.kernels.sign_matmul.triton_dequantize import dequantize_blocks, dequantize_grid
from dbf_compile.signs import BLOCK_ROWS, WORD_BITS

sizes = st.integers(1, 2**15)


@given(sizes, sizes)
def test_tiles_are_blocks_of_whole_words_and_cover_the_matrix(N: int, K: int) -> None:
    every = dequantize_blocks(K)
    assert all(settings not in every[:index] for index, settings in enumerate(every))
    for settings in every:
        assert settings["BLOCK_N"] == BLOCK_ROWS
        assert settings["BLOCK_K"] % WORD_BITS == 0
        programs, *rest = dequantize_grid(N, K, settings)
        assert rest == [1, 1]
        assert programs == -(-N // settings["BLOCK_N"]) * -(-K // settings["BLOCK_K"])
