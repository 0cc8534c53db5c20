"""The settings and the grid of the kernel for many tokens, and the bf16x3 split; results are in ``test_triton_kernel.py``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from dbf_compile.kernels.sign_matmul.triton_prefill import bf16x3_split, prefill_blocks, prefill_grid

sizes = st.integers(1, 2**15)


@given(st.integers(1, 2**15), sizes, st.integers(1, 3))
def test_tiles_of_many_tokens_cover_y(M: int, N: int, operands: int) -> None:
    for settings in prefill_blocks(M, N, operands):
        # The least that tl.dot takes.
        assert all(settings[name] >= 16 for name in ("BLOCK_M", "BLOCK_N"))
        assert settings["BLOCK_K"] % 32 == 0
        programs, *rest = prefill_grid(M, N, settings)
        assert rest == [1, 1]
        assert programs * settings["BLOCK_M"] * settings["BLOCK_N"] >= M * N


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_the_bf16x3_split_holds_a_float32(values: list[float]) -> None:
    z = torch.tensor([values])
    operands = bf16x3_split(z, torch.bfloat16, 3)
    assert operands.dtype == torch.bfloat16
    # Numbers below the smallest normal bfloat16 may be lost.
    tiny = z.abs() < 2.0**-110
    total = operands.double().sum(0)
    assert torch.equal(total[~tiny].nan_to_num(), z.double()[~tiny].nan_to_num())
    assert (total - z.double())[tiny].abs().nan_to_num().le(2.0**-126).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_two_operands_hold_16_bits(values: list[float]) -> None:
    z = torch.tensor([values])
    total = bf16x3_split(z, torch.bfloat16, 2).double().sum(0)
    assert ((total - z.double()).abs() <= 2.0**-15 * z.double().abs() + 2.0**-126).all()
