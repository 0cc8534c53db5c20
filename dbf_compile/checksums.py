"""Checksums of the tensors in a safetensors file, kept in its header: damage is told from what was written.

    header    "checksums": JSON {tensor name: CRC-32 of its dtype, shape and bytes; "": CRC-32 of the rest of the header}

A file that another program writes again has no checksums, and is read without. CRC-32 finds accidents, at the speed at which
memory is read (2.9 GB/s a core on the machine of ``benchmarks/results``; SHA-256 1.2, BLAKE2 0.5); it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

KEY = "checksums"
_HEADER = ""  # in place of a tensor's name
_LENGTH = struct.Struct("<Q")
_LISTED = 5


def with_checksums(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """Return the header of a safetensors file with the checksums of its tensors.

    Args:
        tensors: on the CPU, contiguous.
        header: string metadata.
    """
    table = {name: _tensor_checksum(tensor) for name, tensor in tensors.items()}
    return {**header, KEY: json.dumps({_HEADER: _header_checksum(header), **table})}


def sort_header(path: Path) -> None:
    """Put the string metadata of a safetensors file in order, in place; safetensors writes them in any."""
    with path.open("r+b") as file:
        header = _read_header(file)
        length = file.tell() - _LENGTH.size
        strings = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps({**header, "__metadata__": strings}, separators=(",", ":"), ensure_ascii=False)
        file.seek(_LENGTH.size)
        file.write(text.encode().ljust(length))


def changed_tensors(path: str | os.PathLike[str], part: bool = False) -> list[str] | None:
    """Return what of a safetensors file is not as it was written: names of tensors, and "its header".

    Args:
        path: a file that safetensors can open.
        part: whether it may lack tensors, which then lie in another file that has the same header.

    Returns:
        Names, sorted; none if all is as it was written; None where the file has no checksums.
    """
    with Path(path).open("rb") as file:
        header = _read_header(file)
        strings = header.pop("__metadata__", None) or {}
        table = _table(strings)
        if table is None:
            return None
        start = file.tell()
        size = os.fstat(file.fileno()).st_size
        if part:
            table = {name: value for name, value in table.items() if name in header or name == _HEADER}
        if size == start:  # nothing can be mapped, and only empty tensors lie there
            return _differences(table, strings, header, memoryview(b""))
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
            content[start:] as data,
        ):
            return _differences(table, strings, header, data)


class Stored(NamedTuple):
    """What the header of a safetensors file says.

    Args:
        strings: metadata, without the checksums.
        table: checksums by name of tensor, empty where there are none.
        names: of the tensors in the file.
    """

    strings: dict[str, str]
    table: dict[str, str]
    names: set[str]


def stored_checksums(path: str | os.PathLike[str]) -> Stored:
    """Return what the header of a safetensors file says, without reading a tensor."""
    with Path(path).open("rb") as file:
        header = _read_header(file)
    strings = header.pop("__metadata__", None) or {}
    table = {name: value for name, value in (_table(strings) or {}).items() if name != _HEADER}
    return Stored({key: value for key, value in strings.items() if key != KEY}, table, {*header})


def content_hash(files: Iterable[Stored]) -> str:
    """Return a hash of the tensors in several files, by their checksums; it does not depend on which file holds a tensor."""
    entries = sorted((name, file.table.get(name)) for file in files for name in file.names)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def text_checksum(value: Any) -> str:
    """Return the checksum of what JSON can hold; the order of keys does not matter."""
    return _hex(zlib.crc32(json.dumps(value, sort_keys=True).encode()))


def listed(names: Sequence[str]) -> str:
    """Return names for a message, the first ones of many."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _read_header(file: Any) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(file.read(*_LENGTH.unpack(file.read(_LENGTH.size))))
    return header


def _table(strings: Mapping[str, str]) -> dict[str, str] | None:
    """Return the checksums in a header; a table that cannot be read fits nothing."""
    if KEY not in strings:
        return None
    try:
        table = json.loads(strings[KEY])
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _differences(
    table: Mapping[str, str], strings: Mapping[str, str], entries: Mapping[str, Any], data: memoryview
) -> list[str]:
    """Return the names under which a file holds something else than its table says."""

    def checksum(entry: Mapping[str, Any]) -> str:
        begin, end = entry["data_offsets"]
        with data[begin:end] as content:
            return _checksum(entry["dtype"], entry["shape"], content)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib releases the interpreter's lock
        current = dict(zip(entries, pool.map(checksum, entries.values()), strict=True))
    rest = {key: value for key, value in strings.items() if key != KEY}
    changed = sorted(name for name in {*current, *table} - {_HEADER} if current.get(name) != table.get(name))
    return changed if table.get(_HEADER) == _header_checksum(rest) else [*changed, "its header"]


def _tensor_checksum(tensor: Tensor) -> str:
    # A contiguous tensor of one entry or none may have strides that a view as bytes refuses.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    content = flat.view(torch.uint8).numpy().data
    return _checksum(_dtype_name(tensor.dtype), list(tensor.shape), content)


def _checksum(dtype: str, shape: list[int], content: memoryview) -> str:
    return _hex(zlib.crc32(content, zlib.crc32(f"{dtype} {shape}".encode())))


def _header_checksum(strings: Mapping[str, str]) -> str:
    return text_checksum(dict(strings))


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype."""
    content = save({"x": torch.empty(0, dtype=dtype)})
    (length,) = _LENGTH.unpack(content[: _LENGTH.size])
    name: str = json.loads(content[_LENGTH.size : _LENGTH.size + length])["x"]["dtype"]
    return name
