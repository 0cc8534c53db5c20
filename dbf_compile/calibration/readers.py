"""Files of data, one at a time and no further than they are asked for: texts and rows, plain and compressed.

| ending | what is read |
|---|---|
| ``.jsonl``, ``.ndjson`` | a row a line |
| ``.json`` | a list of rows, rows one after the other, or one object: a row, or a table of rows |
| ``.csv``, ``.tsv`` | rows under the names of the first line |
| ``.parquet``, ``.arrow``, ``.feather`` | rows; needs pyarrow |
| no known one | rows if the first two lines are JSON objects, else a text |
| ``.txt``, ``.md`` and other endings of texts | a text |

Compression (gzip, bzip2, xz, Zstandard), Parquet, Arrow and byte order marks are known by their first bytes.

A text of up to ``WHOLE`` characters is one document. A longer one is cut into pieces of at most ``PIECE`` characters, each
at its last blank line, else at its last line break, else at its last space.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from dbf_compile.calibration.rows import SEPARATOR, Document, refuse_split, table_of
from dbf_compile.errors import ConversionError, DBFError

_log = logging.getLogger(__name__)

WHOLE, PIECE = 2**22, 2**20  # characters
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"}
_BOMS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ARCHIVES = {b"PK\x03\x04": "a ZIP archive", b"7z\xbc\xaf": "a 7z archive", b"%PDF": "a PDF"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_TEXTS = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".log", ".py", ".raw", ".tokens")
_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
ENDINGS = (*_ROWS, *_TEXTS)
_LONGEST_VALUE = 2**28  # characters of one JSON value
_SPACE = " \t\r\n"


def kind_of(path: Path) -> str:
    """Return the ending that says what a file holds, in small letters, without that of its compression."""
    endings = [ending.lower() for ending in path.suffixes]
    while endings and endings[-1] in _COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def read_file(path: Path, column: str | None, split: str | None) -> Iterator[Any]:
    """Yield the rows of a file, or the documents of a text.

    Args:
        path: the file; a pipe serves, too.
        column, split: as for :func:`~dbf_compile.calibration.rows.table_of`, for a ``.json`` file that is one object.

    Raises:
        ConversionError: it cannot be read as what it is; the message names it.
    """
    try:
        yield from _read(path, column, split)
    except DBFError:
        raise
    except csv.Error as error:  # quotes, or a field of more than 131,072 characters
        raise ConversionError(
            f"{path}, which Python's csv cannot read ({error})",
            "as many fields in a line as names in the first; a field that holds a comma or a quote stands in quotes",
            "write it as .jsonl",
        ) from error
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{path}, which is no text in UTF-8 ({error.reason})",
            "UTF-8, or UTF-16 and UTF-32 with a byte order mark",
            "convert it, such as with: iconv -f latin1 -t utf-8; or leave it out, if it is no text",
        ) from error
    except Exception as error:  # every format has errors of its own
        raise unreadable(path, str(error) or type(error).__name__) from error


def unreadable(path: object, reason: str) -> ConversionError:
    """Return the error for a source that cannot be read."""
    return ConversionError(
        f"{str(path)[:200]!r}, which cannot be read ({reason})",
        "files of text in UTF-8 or of rows, a folder of them, or the name of a data set on the Hub",
        "check the path; pass a text itself as [text]",
    )


def _read(path: Path, column: str | None, split: str | None) -> Iterator[Any]:
    with path.open("rb") as raw:
        file = _decompressed(raw)
        head = file.peek(8)[:8]
        for magic, name in _ARCHIVES.items():
            if head.startswith(magic):
                raise unreadable(path, f"it is {name}")
        kind = kind_of(path)
        if kind != ".json":
            refuse_split(split)
        if head.startswith((b"PAR1", b"ARROW1")) or kind in (".parquet", ".arrow", ".feather"):
            from dbf_compile.integrations import datasets

            yield from datasets.table_rows(file, head)
            return
        encoding = next((name for magic, name in _BOMS.items() if head.startswith(magic)), "utf-8")
        lines = io.TextIOWrapper(
            cast(BinaryIO, file), encoding, newline="" if kind in (".csv", ".tsv") else None
        )
        if kind in (".jsonl", ".ndjson"):
            yield from _json_lines(lines, path)
        elif kind == ".json":
            yield from _json_rows(lines, column, split)
        elif kind in (".csv", ".tsv"):
            yield from _csv_rows(lines, "\t" if kind == ".tsv" else ",")
        else:
            yield from _text_or_lines(lines, path, kind)


def _decompressed(raw: BinaryIO) -> io.BufferedReader:
    """Return a file whose compression, known by its first bytes, is undone while it is read."""
    file = cast(io.BufferedReader, raw)
    head = file.peek(6)[:6]
    for magic, module in {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}.items():
        if head.startswith(magic):
            return io.BufferedReader(import_module(module).open(file))  # not every Python has all of them
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        from dbf_compile.integrations import datasets

        return io.BufferedReader(datasets.zstandard_stream(file))
    return file


def _csv_rows(lines: IO[str], delimiter: str) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a table; one that has more fields than names was cut at commas of its text."""
    rows = csv.DictReader(_without_nul(lines), delimiter=delimiter, strict=True)
    names = rows.fieldnames or ()
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise csv.Error(f"two columns {twice!r}")
    for row in rows:
        if rows.restkey in row:
            raise csv.Error(f"line {rows.line_num} has more than {len(names)} fields")
        yield row


def _without_nul(lines: IO[str]) -> Iterator[str]:
    for line in lines:
        yield _checked(line)


def _checked(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds NUL characters: UTF-16 without a byte order mark, or no text")
    return text


def _json_lines(lines: IO[str], path: Path, number: int = 0) -> Iterator[Any]:
    for line in lines:
        number += 1
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error


def _text_or_lines(lines: IO[str], path: Path, kind: str) -> Iterator[Any]:
    """Yield a text, or rows where two lines of a file without a known ending are JSON objects."""
    first = [lines.readline(PIECE), lines.readline(PIECE)]
    if all(_is_json_object(line) for line in first):
        if kind not in _TEXTS:
            yield from _json_lines(cast(IO[str], chain(first, lines)), path)
            return
        _log.warning("%s holds lines of JSON and is read as text; name it .jsonl to read rows", path)
    yield from _pieces(lines, "".join(first))


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _pieces(file: IO[str], text: str) -> Iterator[Document]:
    """Yield a text as one document, or in pieces; joined by their joints they are the text."""
    text += file.read(WHOLE + 1 - len(text))
    if len(text) <= WHOLE:
        yield Document(_checked(text))
        return
    joint = SEPARATOR
    while len(text) > PIECE or len(text := text + file.read(PIECE)) > PIECE:
        head = text[:PIECE]
        cut = next((mark for mark in (SEPARATOR, "\n") if head.rfind(mark) > 0), "")
        end = head.rfind(cut) if cut else max(head.rfind(" "), 0) or PIECE
        yield Document(_checked(text[:end]), joint)
        text, joint = text[end + len(cut) :], cut
    yield Document(_checked(text), joint)


def _json_rows(file: IO[str], column: str | None, split: str | None) -> Iterator[Any]:
    """Yield the rows of a list, of values one after the other, or of the one object that a file is."""
    values = _json_values(file)
    first = list(islice(values, 2))
    if len(first) == 1 and isinstance(first[0], Mapping):
        yield from table_of(first[0], column, split)
        return
    refuse_split(split)
    yield from chain(first, values)


def _json_values(file: IO[str]) -> Iterator[Any]:
    """Yield the entries of a list, or values one after the other, without reading more than one of them ahead."""
    decoder = json.JSONDecoder()
    text, place, size = file.read(2**16), 0, 2**16
    is_list = text.lstrip(_SPACE).startswith("[")
    place = text.find("[") + 1 if is_list else 0
    between = _SPACE + "," if is_list else _SPACE
    while True:
        while place < len(text) and text[place] in between:
            place += 1
        if is_list and text.startswith("]", place):
            return
        try:
            if place == len(text):
                raise json.JSONDecodeError("it ends in the middle", text, place)
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            cut_short = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
            more = file.read(size) if cut_short and len(text) - place < _LONGEST_VALUE else ""
            if not more:
                if place == len(text) and not is_list:
                    return
                raise
            text, place, size = text[place:] + more, 0, 2 * size
            continue
        size = 2**16
        yield value
