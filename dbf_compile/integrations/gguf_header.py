"""The header of a GGUF file: what it says of its model and of its tensors, read and checked without their content.

    "GGUF", version, number of tensors, number of entries
    entries        key, type, value
    tensors        name, sizes (the last axis first), type, offset
    content        aligned, at its offset behind the table

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dbf_compile.errors import CheckpointError, ConversionError

SOURCE = "gguf_source.json"  # beside the folder that a file was dequantized into: its type and bits
_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT = 4096  # entries of an array that are kept; vocabularies have more
_MAX_AXES, _MAX_NESTING = 4, 4
_SHARD_DO = "join its parts: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"


class StoredTensor(NamedTuple):
    """A tensor in a file: name, shape as torch has it, number of its type, and where its content begins."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of a whole file.

    Attributes:
        metadata: key to value; long arrays are their length.
        tensors: in the order of the file.
        content: offset of the first tensor.
        size: bytes of the file.
    """

    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    content: int
    size: int

    @property
    def architecture(self) -> str:
        """The architecture, such as "llama"."""
        return str(self.metadata["general.architecture"])

    @property
    def weights(self) -> int:
        """The number of values in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def of_model(self, key: str, default: Any = None) -> Any:
        """Return the entry that the architecture has for ``key``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(path: Path) -> Header:
    """Return the header of a file.

    Raises:
        ConversionError: the file is no GGUF, of a version that nobody writes, or a part of a model.
        CheckpointError: its header is damaged, or its end is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(24)
        if start[:4] != _MAGIC:
            raise ConversionError(
                f"{path}, which is no GGUF file", "a file that begins with GGUF", "check the path"
            )
        try:
            version, tensors, entries = struct.unpack("<IQQ", start[4:])
            if version not in _VERSIONS:
                raise ConversionError(
                    f"{path} of GGUF version {version}",
                    f"versions {' and '.join(map(str, _VERSIONS))}, little-endian",
                    "convert the model again",
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                header = _parsed(_Reader(content, 24), tensors, entries, size)
        except (ValueError, OverflowError, KeyError) as error:
            if isinstance(error, (ConversionError, CheckpointError)):
                raise
            raise damaged(path, str(error)) from error
        except (_TooShortError, struct.error) as error:  # struct finds no number at the end
            raise cut_short(path, "its header ends too early") from error
    _refuse_part(path, header)
    return header


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file whose content is not as it was written."""
    return CheckpointError(
        f"{path}, which is damaged ({reason})", "a whole GGUF file", "download or convert it again"
    )


def cut_short(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file without its end, which somebody may be writing still."""
    return CheckpointError(
        f"{path}, which is cut short ({reason})",
        "a whole GGUF file",
        "wait until it is written, or download it again",
    )


class _TooShortError(Exception):
    """A header ends before its last entry."""


def _parsed(reader: _Reader, tensors: int, entries: int, size: int) -> Header:
    metadata = {}
    for _ in range(entries):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("no general.architecture")
    table = tuple(reader.tensor() for _ in range(tensors))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment = {alignment!r}")
    return Header(metadata, table, -(-reader.place // alignment) * alignment, size)


def _refuse_part(path: Path, header: Header) -> None:
    parts = header.metadata.get("split.count", 0)
    if parts > 1:
        raise ConversionError(f"{path}, one of {parts} parts of a model", "a model in one file", _SHARD_DO)


class _Reader:
    """Reads one value after the other; whatever lies behind the end is an error."""

    def __init__(self, content: mmap.mmap, place: int) -> None:
        self._content, self.place = content, place

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._content, self.place)
        self.place += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        start = self._skipped(self.number("Q"))
        return self._content[start : self.place].decode("utf-8", errors="replace")

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and nesting < _MAX_NESTING:
            return self._array(nesting)
        if kind not in _FORMATS:
            raise ValueError(f"a value of type {kind}")
        return self.number(_FORMATS[kind])

    def tensor(self) -> StoredTensor:
        name, axes = self.text(), self.number("I")
        if axes > _MAX_AXES:
            raise ValueError(f"{name!r} with {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return StoredTensor(name, shape, self.number("I"), self.number("Q"))

    def _array(self, nesting: int) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if count > _KEPT and kind in _FORMATS:
            self._skipped(count * struct.calcsize(f"<{_FORMATS[kind]}"))
            return count
        values = (self.value(kind, nesting + 1) for _ in range(count))
        if count <= _KEPT:
            return list(values)
        for _ in values:
            pass
        return count

    def _skipped(self, size: int) -> int:
        start = self.place
        if size > len(self._content) - start:
            raise _TooShortError
        self.place += size
        return start
