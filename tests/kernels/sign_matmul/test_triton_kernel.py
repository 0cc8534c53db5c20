"""The Triton kernels against the truth in float64, run by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cuda.triton_cases import CASES, Case, run_all

pytest.importorskip("triton")

from dbf_compile.kernels.sign_matmul.triton_decode import choose_split_k, decode_blocks, decode_grid
from dbf_compile.kernels.sign_matmul.triton_prefill import (
    bf16x3_split,
    prefill_blocks,
    prefill_grid,
)
from dbf_compile.signs import words_per_row

sizes = st.integers(1, 2**15)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_truth(case: Case, results: dict[str, Any]) -> None:
    report = results["reports"][str(case)]
    assert report.poisoned
    assert (report.shape, report.dtype) == ([*case.lead, case.N], case.result)
    assert report.exact
    assert report.worst <= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_tile_is_correct(case: Case, results: dict[str, Any]) -> None:
    assert results["reports"][str(case)].exact_with_other_tiles


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if math.prod(case.lead) * case.N * case.K and case.result == "float32"],
    ids=str,
)
def test_the_tolerance_sees_one_wrong_sign(case: Case, results: dict[str, Any]) -> None:
    # One sign in 97 is hardly more than 97 roundings to bfloat16 at their worst.
    rounded = math.prod(case.lead) > 16 and case.dtype != "float32" and case.scaled
    assert results["reports"][str(case)].worst_with_wrong_sign > (1 if rounded else 10)


def test_infinite_and_undefined_activations_propagate(results: dict[str, Any]) -> None:
    assert results["not_finite"] == []


@given(st.integers(1, 16), sizes, sizes, st.booleans())
def test_tiles_of_few_tokens_cover_y(M: int, N: int, K: int, split: bool) -> None:
    split_k = choose_split_k(M, N, K) if split else 1
    for settings in decode_blocks(M, N, K, split_k):
        assert settings["SPLIT_K"] == split_k
        assert all(settings[name] & (settings[name] - 1) == 0 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_W"))
        programs, *rest = decode_grid(M, N, settings)
        assert rest == [1, 1]
        tiles = -(-M // settings["BLOCK_M"]) * -(-N // settings["BLOCK_N"])
        assert programs == split_k * tiles
        luts = settings["BLOCK_M"] * settings["BLOCK_W"] * 512
        assert luts <= 64 << 10, "bytes of shared memory that every GPU has"


@given(st.integers(1, 16), st.integers(1, 40000), st.integers(1, 40000))
def test_splits_of_columns_are_few_and_not_empty(M: int, N: int, K: int) -> None:
    split_k, words = choose_split_k(M, N, K), words_per_row(K)
    assert 1 <= split_k <= 4
    assert split_k == 1 or M == 1
    for settings in decode_blocks(M, N, K, split_k):
        step = settings["BLOCK_W"]
        share = -(-words // (split_k * step)) * step  # of each split, as the kernel divides them
        assert step > 32 or (split_k - 1) * share < words


def test_defaults_are_among_the_best_that_were_measured() -> None:
    """At most 7 % slower than the best setting, in times recorded on an H200 with rows of words one after the other."""
    recorded: dict[tuple[str, ...], dict[tuple[str, str], float]] = defaultdict(dict)
    with (Path(__file__).parents[3] / "benchmarks/results/gpu_rounds.csv").open() as file:
        for row in csv.DictReader(file):
            if row["kernel"].startswith(("tables without bank conflicts", "the same")):
                size = (row["round"], row["tokens"], row["rows_x_columns"], row["parts"])
                recorded[size][row["tile"], row["warps"]] = float(row["median_us"])
    behind = []
    for (_, tokens, shape, parts), times in recorded.items():
        M, (N, K) = int(tokens), map(int, shape.split("x"))
        if int(parts) in (1, choose_split_k(M, N, K)):
            default = decode_blocks(M, N, K, int(parts))[0]
            tile = "x".join(str(default[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_W"))
            if (tile, str(default["num_warps"])) in times:
                behind.append(times[tile, str(default["num_warps"])] / min(times.values()))
    assert len(behind) == 71
    assert statistics.median(behind) == 1
    assert max(behind) < 1.07


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
