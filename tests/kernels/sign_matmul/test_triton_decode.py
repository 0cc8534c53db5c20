"""The settings and the grid of the kernel for few tokens; what it computes is in ``test_triton_kernel.py``."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from dbf_compile.kernels.sign_matmul.triton_decode import choose_split_k, decode_blocks, decode_grid
from dbf_compile.signs import words_per_row

sizes = st.integers(1, 2**15)


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
