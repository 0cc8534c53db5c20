"""Kinds of text: sources of a command line and of Python, told apart by kind."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.calibration.kinds import KINDS, OTHER, by_kind, parse_sources


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.text(min_size=1, max_size=9)), max_size=6))
def test_every_source_stands_under_its_kind_in_order(pairs):
    sources = parse_sources([f"{kind}={source}" for kind, source in pairs])
    assert {kind: [source for other, source in pairs if other == kind] for kind, _ in pairs} == sources
    assert list(sources) == list(dict.fromkeys(kind for kind, _ in pairs))


def test_a_source_without_a_kind_is_another(tmp_path):
    assert parse_sources(["a.txt", "code=b.py", "./c=d.txt", "medicine=e.txt", "märchen=f.txt"]) == {
        OTHER: ["a.txt", "./c=d.txt"],
        "code": ["b.py"],
        "medicine": ["e.txt"],
        "märchen": ["f.txt"],
    }
    path = tmp_path / "code=b.py"
    path.touch()
    assert parse_sources([str(path)]) == {OTHER: [str(path)]}
    assert parse_sources(["x" * 99_999]) == {OTHER: ["x" * 99_999]}


def test_a_file_that_exists_is_a_path_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("code=b.py").touch()
    assert parse_sources(["code=b.py"]) == {OTHER: ["code=b.py"]}


def test_a_mapping_of_kinds_is_no_table():
    assert by_kind({"code": ["def f(): ..."], "web": "pages.txt"}) == {
        "code": ["def f(): ..."],
        "web": "pages.txt",
    }
    assert by_kind({"medicine": Path("a.txt"), "law": [Path("b.txt"), Path("c.txt")]}) is not None
    mixed = {"medicine": Path("a.txt"), "law": ["a text"]}
    assert by_kind(mixed) == mixed  # else the path would be no part of a table, and be left out
    for table in ({"text": ["a"]}, {"train": ["a"], "test": ["b"]}, {"text": "a"}, {}, "a.txt", ["a"], None):
        assert by_kind(table) is None
    assert by_kind({"code": ["a"]}, column="code") is None
