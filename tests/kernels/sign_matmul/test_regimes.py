"""Limits of the number of tokens: every number has one kernel, and unknown numbers none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.kernels.sign_matmul.regimes import (
    DECODE_TOKENS,
    FUSED_TOKENS,
    Regime,
    choose_regime,
    is_beyond_decode,
    is_decode,
    operand_count,
    operand_dtype,
)


@given(st.integers(0, 4 * FUSED_TOKENS), st.integers(1, 3))
def test_every_number_of_tokens_has_one_regime(tokens: int, operands: int) -> None:
    regime = choose_regime(tokens, operands)
    assert is_decode(tokens) == (regime is Regime.DECODE) != is_beyond_decode(tokens)
    assert (regime is Regime.DENSE) == (tokens > FUSED_TOKENS and operands == 1)


def test_the_limits_belong_to_the_smaller_regime() -> None:
    limits = (DECODE_TOKENS, DECODE_TOKENS + 1, FUSED_TOKENS, FUSED_TOKENS + 1)
    expected = [Regime.DECODE, Regime.PREFILL, Regime.PREFILL, Regime.DENSE]
    assert [choose_regime(tokens, 1) for tokens in limits] == expected


def test_an_unknown_number_of_tokens_has_none() -> None:
    assert choose_regime(object(), 1, lambda tokens, limit: None) is None
    assert choose_regime(object(), 3, lambda tokens, limit: False if limit == DECODE_TOKENS else None) is None
    assert not is_decode(object()) and not is_beyond_decode(object())


@pytest.mark.parametrize(
    ("x", "result", "fast", "dtype", "count"),
    [
        (torch.bfloat16, None, False, torch.bfloat16, 1),
        (torch.float16, torch.bfloat16, False, torch.float16, 1),
        (torch.float32, torch.float16, False, torch.float16, 1),
        (torch.float32, None, False, torch.bfloat16, 3),
        (torch.float32, torch.float32, True, torch.bfloat16, 2),
    ],
)
def test_what_tensor_cores_get(
    x: torch.dtype, result: torch.dtype | None, fast: bool, dtype: torch.dtype, count: int
) -> None:
    assert (operand_dtype(x, result), operand_count(x, result, fast)) == (dtype, count)
