"""Data sets of the Hub and in folders of the ``datasets`` library, and tables that pyarrow reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dbf_compile.errors import ConversionError

_ROWS = 256  # read at a time


def of_hub(name: str) -> Any:
    """Return a data set of the Hub, which is read as far as needed.

    Args:
        name: of the data set; the name of one of its configurations may follow after a colon.

    Raises:
        ConversionError: the ``datasets`` package is not installed, or the Hub does not give the data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise _missing(f"{name!r}, which is no file here and may be a data set of the Hub", error) from error
    path, _, configuration = name.partition(":")
    # What lies in the cache can be read without a network, but not streamed.
    streaming = not datasets.config.HF_HUB_OFFLINE
    try:
        return datasets.load_dataset(path, configuration or None, streaming=streaming)
    except Exception as error:  # no such name, no configuration, no network, no permission: of many types
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"{name!r}, which is no file here, and which the Hub does not give ({reason})",
            "the path of a file or folder, or a data set as name or name:configuration",
            "check the path or the name; pass a text itself as [text]",
        ) from error


def saved(folder: Path) -> Any:
    """Return the data set that ``save_to_disk`` wrote to a folder; it stays on the disk.

    Raises:
        ConversionError: the ``datasets`` package is not installed, or the folder is damaged.
    """
    try:
        import datasets
    except ImportError as error:
        raise _missing(f"{folder}, a folder of the datasets library", error) from error
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{folder}, which the datasets library cannot load ({error})",
            "what save_to_disk wrote",
            "save it again",
        ) from error


def table_rows(file: io.BufferedReader, head: bytes) -> Iterator[dict[str, Any]]:
    """Yield the rows of an open file of Parquet or Arrow; ``head`` is its first bytes.

    Raises:
        ConversionError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing("a file of Parquet or Arrow", error) from error
    if head.startswith(b"PAR1"):
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_ROWS)
    elif head.startswith(b"ARROW1"):
        table = pyarrow.ipc.open_file(file)
        batches = (table.get_batch(index) for index in range(table.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(file)
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield from batch.slice(start, _ROWS).to_pylist()


def zstandard_stream(file: io.BufferedReader) -> Any:
    """Return a file whose Zstandard compression is undone while it is read.

    Raises:
        ConversionError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise _missing("a file in Zstandard", error) from error
    return pyarrow.CompressedInputStream(file, "zstd")


def _missing(got: str, error: ImportError) -> ConversionError:
    return ConversionError(
        f"{got}, without the package {error.name}",
        "the package installed, or text and JSON",
        "pip install 'dbf-compile[data]'",
    )
