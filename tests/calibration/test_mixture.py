"""Mixtures: shares of kinds, windows of several files in turn, windows kept back, the order of all."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from support.models.tiny import tiny_llama

from dbf_compile.calibration.mixture import Part, interleaved, read_parts, split_count
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.options import CompressOptions


def bytewise(text: str) -> dict[str, list[int]]:
    return {"input_ids": list(text.encode())}


def parts_of(data: Any, windows: int = 6, **options: Any) -> list[Part]:
    settings = CompressOptions(length=4, progress=False, **options)
    return read_parts(tiny_llama(), data, bytewise, settings, windows, 16)


def first_letters(part: Part) -> str:
    return "".join(chr(batch["input_ids"][0, 0]) for batch in (*part.calibrating, *part.judging))


@given(st.integers(0, 200), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_counts_are_whole_and_none_is_more_than_one_off_its_share(total: int, shares: list[float]) -> None:
    counts = split_count(total, {str(index): share for index, share in enumerate(shares)})
    assert sum(counts.values()) == total
    for count, share in zip(counts.values(), shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_every_kind_is_spread_over_the_whole_in_its_order(sizes: list[int]) -> None:
    rows = [[(kind, place) for place in range(size)] for kind, size in enumerate(sizes)]
    mixed = interleaved(rows)
    for kind, row in enumerate(rows):
        assert [item for item in mixed if item[0] == kind] == row
        for place in range(len(row)):  # where it stands is where it stands in its row, to one of each kind
            share = (mixed.index((kind, place)) + 0.5) / len(mixed)
            assert abs(share - (place + 0.5) / len(row)) <= len(rows) / len(mixed)


def test_kinds_have_their_shares_and_windows_kept_back(tmp_path: Path) -> None:
    code, web = tmp_path / "c.py", tmp_path / "w.txt"
    for path in (code, web):
        path.write_text(path.stem * 160)
    data = {"code": code, "web": [web]}
    parts = {part.kind: part for part in parts_of(data, 12, holdout=4, shares={"code": 3})}
    sizes = {kind: (len(part.calibrating), len(part.judging)) for kind, part in parts.items()}
    assert sizes == {"code": (9, 2), "web": (3, 0)}  # of eleven and three; no more than a fifth is kept back
    assert set(first_letters(parts["code"])) == {"c"} and parts["web"].source == str(web)


def test_windows_to_judge_with_are_no_more_windows_to_calibrate_with() -> None:
    (part,) = parts_of(["abcd" * 99], 8, holdout=90)
    assert (len(part.calibrating), len(part.judging)) == (8, 2)


def test_a_list_of_files_gives_a_window_of_each_in_turn_and_joins_the_short_ones(tmp_path: Path) -> None:
    texts = {"a": "aaaa" * 2, "b": "bb", "c": "cccc" * 9, "d": "dd"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in texts]
    (part,) = parts_of(paths, 40, holdout=0)
    assert first_letters(part) == "acac" + "c" * 7 + "b"  # "bb", a blank line and "dd" make one window
    (part,) = parts_of(paths, 3, holdout=0)
    assert first_letters(part) == "aca"
    with pytest.raises(ConversionError, match="2 tokens"):
        parts_of([tmp_path / "b"], 3)


def test_what_has_less_text_than_its_share_says_so(tmp_path: Path, caplog: Any) -> None:
    parts = parts_of({"code": ["cccc" * 2], "web": ["wwww" * 40]}, 20, holdout=0)
    assert [len(part.calibrating) for part in parts] == [2, 10]
    assert "code has 2 windows of the 10 that its share asks for" in caplog.text
    (part,) = parts_of({"code": ["cccc" * 9], "web": ["wwww" * 9]}, 1, holdout=0)
    assert part.kind == "code" and "no window of web" in caplog.text


@pytest.mark.parametrize(
    "shares", [{"code": -1.0}, {"code": 0.0, "web": 0.0}, {"math": 1.0}, {"code": float("nan")}], ids=str
)
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="of the kinds code, web"):
        parts_of({"code": ["cccc"], "web": ["wwww"]}, shares=shares)


def test_an_error_names_the_kind_whose_data_it_is() -> None:
    with pytest.raises(ConversionError, match="code: a source of 2 tokens"):
        parts_of({"web": ["wwww" * 9], "code": ["cc"]})
