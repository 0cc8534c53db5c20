"""What ``data`` may be: files, folders, patterns, data sets of the Hub and in memory, tables, rows and texts.

Everything ends as a stream of documents (:mod:`~dbf_compile.calibration.rows`), read no further than it is asked for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dbf_compile.calibration.readers import ENDINGS, kind_of, read_file, unreadable
from dbf_compile.calibration.rows import Document, document_of, refuse_split, table_of
from dbf_compile.errors import ConversionError
from dbf_compile.files import user_path

_PATTERN = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(:[\w.-]{1,96})?")
_ABOUT_DATA = ("readme", "license", "dataset_info", "dataset_infos", "dataset_dict", "state", "datapackage")
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation"}


def documents(source: Any, tokenizer: Any, column: str | None, split: str | None) -> Iterator[Document]:
    """Yield the documents of a source.

    Args:
        source: as for :func:`~dbf_compile.calibration.batches.token_batches`.
        tokenizer: its chat template renders conversations.
        column: of rows, the one to read; None for the first that is known.
        split: of a source that has several, the one to read.

    Raises:
        ConversionError: it cannot be read as what it is, or holds something else than texts, conversations and ids.
    """
    rows, is_empty = 0, True
    for item in _items(source, column, split):
        rows += 1
        document = document_of(item, tokenizer, column)
        if document is not None:
            is_empty = False
            yield document
    if rows and is_empty:
        raise ConversionError(
            f"{rows} rows without a text in the column that is read",
            "rows that have one",
            "pass column=... to name that of the texts, or look at the file: a table may have another delimiter",
        )


def name_of(source: Any) -> str:
    """Return what a report calls a source: its paths or names, or "texts"."""
    if isinstance(source, (str, Path)):
        return str(source)
    return ", ".join(map(str, source)) if are_paths(source) else "texts"


def _items(source: Any, column: str | None, split: str | None) -> Iterator[Any]:
    if isinstance(source, (str, Path)):
        yield from _stored(str(source), column, split)
    elif isinstance(source, Mapping):
        yield from _items(table_of(source, column, split), column, None)
    elif are_paths(source):
        for path in source:
            yield from _stored(str(path), column, split)
    else:
        refuse_split(split)
        rows = _rows_of(source)
        if isinstance(rows, (bytes, bytearray, io.IOBase)) or not isinstance(rows, Iterable):
            raise ConversionError(
                f"a source of type {type(source).__name__}",
                "paths, texts, rows, a table, or a data set",
                "pass its path, or [text]",
            )
        yield from rows


def _rows_of(source: Any) -> Any:
    """Return what is iterated over: frames and tables give columns otherwise."""
    rows = source
    if hasattr(source, "iter_rows"):  # polars
        rows = source.iter_rows(named=True)
    elif hasattr(source, "to_pylist"):  # pyarrow
        rows = source.to_pylist()
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        rows = source.to_dict("records")
    return rows


def are_paths(source: Any) -> bool:
    """Return whether a list holds paths and no texts: all are ``Path``, or words with the ending of a file."""
    return isinstance(source, (list, tuple)) and bool(source) and all(map(_is_path, source))


def _is_path(item: Any) -> bool:
    if isinstance(item, Path):
        return True
    one_word = isinstance(item, str) and len(item) < 1024 and not re.search(r"\s", item)
    return one_word and kind_of(Path(item)) in ENDINGS


def _stored(name: str, column: str | None, split: str | None) -> Iterator[Any]:
    """Yield what a path, a pattern, or a name on the Hub stands for."""
    path = user_path(name)
    try:
        there, is_folder, is_link = path.exists(), path.is_dir(), path.is_symlink()
    except OSError:  # a text, longer than any path
        there, is_folder, is_link = False, False, False
    if is_folder and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        from dbf_compile.integrations import datasets

        yield from _items(datasets.saved(path), column, split)
    elif is_folder:
        for file in _files(path, split):
            yield from read_file(file, column, None)
    elif there:
        yield from read_file(path, column, split)
    elif is_link:
        raise unreadable(name, f"a link to {path.readlink()}, where nothing is")
    elif _PATTERN.search(name) and len(name) < 1024:
        root = Path(path.anchor)
        matches = sorted(root.glob(str(path.relative_to(root))))
        if not matches:
            raise unreadable(name, "no file matches")
        for match in matches:
            if match.is_file():
                yield from read_file(match, column, split)
    elif not _HUB_NAME.fullmatch(name) or kind_of(path) in ENDINGS:
        raise unreadable(name, "no such file")
    else:
        from dbf_compile.integrations import datasets

        yield from _items(datasets.of_hub(name), column, split)


def _files(folder: Path, split: str | None) -> list[Path]:
    """Return the files of data in a folder, in order; where their names are those of several splits, those of one."""
    named: dict[str, list[Path]] = {}
    files = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith((".", "_")) for part in inside.parts)
        about = inside.name.lower().split(".")[0] in _ABOUT_DATA
        if kind_of(path) in ENDINGS and path.is_file() and not hidden and not about:
            files.append(path)
            splits = [_SPLITS[word] for word in re.split(r"[\W_]+", str(inside).lower()) if word in _SPLITS]
            if splits:
                named.setdefault(splits[-1], []).append(path)
    if not files:
        raise unreadable(folder, f"no file in it ends in {', '.join(ENDINGS)}")
    if split is None and len(named) < 2:
        return files
    chosen: list[Path] = table_of(named, None, None if split is None else _SPLITS.get(split, split))
    return chosen
