"""Files: every kind gives the same rows, plain and compressed, and what is damaged is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.calibration import readers
from dbf_compile.calibration.readers import kind_of, read_file
from dbf_compile.calibration.rows import Document
from dbf_compile.errors import ConversionError

ROWS = [{"text": "one, two\nthree", "n": "1"}, {"text": 'four "ü" five', "n": "2"}, {"text": "six", "n": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
needs_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")


def rows(path: Path) -> list[Any]:
    return list(read_file(path, None, None))


def table(delimiter: str) -> str:
    import io

    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


FILES = {
    "a.jsonl": LINES,
    "a.ndjson": "\n" + LINES.replace("\n", "\r\n\r\n"),
    "a.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "lines.json": LINES,
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "columns.json": json.dumps({"text": [row["text"] for row in ROWS], "n": [row["n"] for row in ROWS]}),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "no_ending": LINES,
    "part-0001.2024": LINES,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_every_kind_gives_the_same_rows(name: str, compression: str, tmp_path: Path) -> None:
    content = FILES[name].encode()
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(compression, bytes)
    path = tmp_path / (f"{name}.{compression}" if compression else name)
    path.write_bytes(compress(content))
    assert rows(path) == ROWS
    if compression:  # known by its content, whatever the name says
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / name).write_bytes(compress(content))
        assert rows(tmp_path / "plain" / name) == ROWS


@needs_pyarrow
@pytest.mark.slow
def test_tables_of_pyarrow_and_zstandard(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    written = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(written, tmp_path / "a.parquet", row_group_size=2)
    pyarrow.parquet.write_table(written, tmp_path / "named.bin")
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), written.schema) as writer:
        writer.write_table(written)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), written.schema) as writer:
        writer.write_table(written)
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(LINES.encode())
    for path in sorted(tmp_path.iterdir()):
        assert rows(path) == ROWS, path.name


def test_pyarrow_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(ConversionError, match=r"without the package pyarrow.*dbf-compile\[data\]"):
        rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_a_text_is_one_document_in_every_encoding(encoding: str, line_break: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"häuser{line_break}{line_break}€ und 𝄞".encode(encoding))
    assert rows(path) == [Document("häuser\n\n€ und 𝄞")]


def test_a_text_of_json_lines_is_a_text_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    assert rows(tmp_path / "a.txt") == [Document(LINES)]
    assert "name it .jsonl" in caplog.text
    (tmp_path / "prose").write_text('{"text": "one line of JSON"}\nand prose')
    assert isinstance(rows(tmp_path / "prose")[0], Document)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "latin.txt": (("ä" * 20000).encode("latin-1"), "utf-8"),
    "border.txt": (b"a" * 8191 + b"\xff\xfe\xff", "utf-8"),
    "cut.txt": (("ä" * 10000).encode()[:-1], "utf-8"),
    "wide.txt": ("wide".encode("utf-16-le"), "NUL characters"),
    "nul.csv": (b"text\na\0b\n", "NUL characters"),
    "line.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3 is no JSON"),
    "cut.json": (b'[{"text": "a"}, {"text', "Unterminated"),
    "open.json": (b'[{"text": "a"}', "ends in the middle"),
    "middle.json": (b'[{"text": "a"} oops {"text": "a"}]' + b" " * 100, "Expecting"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 100)[:-12], "ended before"),
    "wrong.txt.gz": (b"\x1f\x8b no gzip", "gzip|method"),
    "a.zip": (b"PK\x03\x04 rest", "ZIP archive"),
    "a.pdf": (b"%PDF-1.7", "a PDF"),
    "quotes.csv": (b'text\n"never closed', "csv cannot read"),
    "long.csv": (b"text\n" + b"a" * 200000, "write it as .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    content, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=f"(?s){name}.*({reason})"):
        rows(tmp_path / name)


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2, 20), st.integers(20, 60))
def test_pieces_joined_by_their_joints_are_the_text(text: str, piece: int, whole: int) -> None:
    import io

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", piece)
        patch.setattr(readers, "WHOLE", whole)
        documents = list(readers._pieces(io.StringIO(text), ""))
    assert documents[0].content + "".join(one.joint + str(one.content) for one in documents[1:]) == text
    assert all(len(one.content) <= piece for one in documents) or len(documents) == 1
    assert (len(documents) == 1) == (len(text) <= whole or len(text) <= piece)


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl", "big.json"])
def test_a_large_file_is_read_as_far_as_needed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "WHOLE", 2**12)
    monkeypatch.setattr(readers, "PIECE", 2**10)
    row = json.dumps({"text": "word " * 20})
    content = {
        "big.txt": "a text\n\n" * 2**17,
        "big.jsonl": f"{row}\n" * 2**13,
        "big.json": f"[{row}" + f",{row}" * 2**13,
    }
    path = tmp_path / name
    path.write_text(content[name] + "\0 and then nothing that could be read")
    stream = read_file(path, None, None)
    assert all(next(stream) for _ in range(3))


@given(
    st.lists(st.dictionaries(st.sampled_from(["text", "n"]), st.text(max_size=30), min_size=1), max_size=8)
)
def test_json_is_read_as_json_reads_it(values: list[dict[str, str]]) -> None:
    import io

    for text in (json.dumps(values), json.dumps(values, indent=1), "\n".join(map(json.dumps, values))):
        assert list(readers._json_values(io.StringIO(text))) == values


def test_the_ending_counts_without_that_of_the_compression() -> None:
    names = {
        "a.jsonl": ".jsonl",
        "a.JSON.GZ": ".json",
        "a.v2.csv.zst": ".csv",
        "a": "",
        "a.gz": "",
        "a.bin": ".bin",
    }
    assert {name: kind_of(Path(name)) for name in names} == names


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,n\none, two,1\n", "line 2 has more than 2 fields"),
        ("a.tsv", b"text\tn\none\t1\ntwo\t2\t3\n", "line 3 has more than 2 fields"),
        ("a.csv", b"text,n,text\none,1,two\n", "two columns 'text'"),
        ("a.txt", "grün".encode("latin-1"), r"no text in UTF-8.*iconv"),
        ("a.jsonl", '{"text": "grün"}'.encode("latin-1"), r"no text in UTF-8.*iconv"),
        ("a.csv", "text\ngrün".encode("latin-1"), r"no text in UTF-8.*iconv"),
        ("a.json", "\"grün\"".encode("latin-1"), r"no text in UTF-8.*iconv"),
    ],
)  # fmt: skip
def test_what_would_be_read_as_something_else_is_refused(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=words):
        rows(tmp_path / name)
