"""Damage to compressed folders and factor files that knows what they hold: tensors, headers, indexes, configurations.

Every damage follows from one random generator. Files are bytes by name; nothing touches a disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

Files = dict[str, bytes]
WIDTHS = {"I32": 4, "U32": 4, "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "I64": 8, "F64": 8, "BOOL": 1, "U8": 1}
INDEX = "model.safetensors.index.json"
HUGE = (2**31, 2**40, 2**63, 10**20)


class Damage(NamedTuple):
    """What was done.

    Args:
        kind: for the table.
        file: that was damaged.
        text: all that was done, to read.
        config: a field of the dense model's configuration was changed, which is the user's to change.
    """

    kind: str
    file: str
    text: str
    config: bool = False


class Tensor(NamedTuple):
    """An entry of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


# Files of safetensors


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the bytes behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def build(header: dict[str, Any], data: bytes) -> bytes:
    """Return the content of a file."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def read_tensors(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file, by name."""
    header, data = parse(content)
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def write_tensors(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """Return the content of a file of tensors, one behind the other."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(tensor.data)],
        }
        end += len(tensor.data)
    return build(header, b"".join(tensor.data for tensor in tensors.values()))


# Tensors: the file stays whole


def _flip_bits(tensors: dict[str, Tensor], random: Random) -> str:
    name = random.choice([name for name, tensor in tensors.items() if tensor.data])
    tensor, count = tensors[name], random.choice((1, 1, 1, 8, 64))
    data = bytearray(tensor.data)
    for _ in range(count):
        place = random.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
    tensors[name] = tensor._replace(data=bytes(data))
    return f"{count} bits of {name}"


_NUMBERS = {"F32": "f", "F16": "e", "F64": "d"}


def _number(value: float, dtype: str) -> bytes:
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    if dtype == "F16" and math.isfinite(value):
        value = max(-65504.0, min(65504.0, value))
    return struct.pack(f"<{_NUMBERS[dtype]}", value)


def _spoil_scales(tensors: dict[str, Tensor], random: Random) -> str:
    names = [name for name, tensor in tensors.items() if ".scale_" in name]
    name, value = random.choice(names), random.choice((math.nan, math.inf, -math.inf, 3e38, -1.0, 0.0, 1e-40))
    tensor = tensors[name]
    number = _number(value, tensor.dtype)
    entries = len(tensor.data) // len(number)
    places = range(entries) if random.random() < 0.3 else [random.randrange(entries)]
    data = bytearray(tensor.data)
    for place in places:
        data[place * len(number) : (place + 1) * len(number)] = number
    tensors[name] = tensor._replace(data=bytes(data))
    return f"{len(places)} of {entries} entries of {name} are {value}"


def _swap_tensors(tensors: dict[str, Tensor], random: Random) -> str:
    """Swap two tensors of one kind, of equal shapes where there are such: as if their names were swapped."""
    one = random.choice(list(tensors))
    alike = [name for name in tensors if name != one and tensors[name][:2] == tensors[one][:2]]
    kind = [name for name in tensors if name != one and name.rpartition(".")[2] == one.rpartition(".")[2]]
    other = random.choice(
        (alike if random.random() < 0.8 else kind) or [name for name in tensors if name != one]
    )
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return f"{one} and {other} swapped"


def _swap_layers(tensors: dict[str, Tensor], random: Random) -> str:
    layers = sorted({name.rpartition(".")[0] for name in tensors if ".scale_out" in name})
    one, other = random.sample(layers, 2)
    for kind in ("signs_in", "signs_out", "scale_in", "scale_mid", "scale_out"):
        names = f"{one}.{kind}", f"{other}.{kind}"
        if all(name in tensors for name in names):
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    return f"layers {one} and {other} swapped"


def _duplicate(tensors: dict[str, Tensor], random: Random) -> str:
    one = random.choice(list(tensors))
    if random.random() < 0.5:
        other = random.choice([name for name in tensors if name != one])
        tensors[other] = tensors[one]
        return f"{other} is {one}"
    tensors[f"{one}_copy"] = tensors[one]
    return f"{one}_copy added"


def _remove(tensors: dict[str, Tensor], random: Random) -> str:
    one = random.choice(list(tensors))
    del tensors[one]
    return f"{one} removed"


def _rename(tensors: dict[str, Tensor], random: Random) -> str:
    one = random.choice(list(tensors))
    other = random.choice((one.upper(), one[:-1], f"model.{one}", one.replace("0", "7"), f"{one}.weight", ""))
    tensors[other] = tensors.pop(one)
    return f"{one} renamed {other!r}"


def _reshape(tensors: dict[str, Tensor], random: Random) -> str:
    """Other shapes of as many numbers, or a row more or less, with the bytes that belong to it."""
    one = random.choice([name for name, tensor in tensors.items() if tensor.data])
    tensor = tensors[one]
    count, width = math.prod(tensor.shape), len(tensor.data) // math.prod(tensor.shape)
    rows, *rest = tensor.shape
    shape = random.choice(
        (
            tensor.shape[::-1],
            (count,),
            (1, *tensor.shape),
            (*tensor.shape, 1),
            (rows + 1, *rest),
            (rows - 1, *rest),
        )
    )
    size = math.prod(shape) * width
    tensors[one] = tensor._replace(shape=shape, data=(tensor.data * 2)[:size])
    return f"{one} of shape {shape}, not {tensor.shape}"


def _retype(tensors: dict[str, Tensor], random: Random) -> str:
    """Another dtype, with numbers of its width."""
    one = random.choice([name for name, tensor in tensors.items() if tensor.data])
    tensor = tensors[one]
    count = math.prod(tensor.shape)
    dtype = random.choice([name for name in WIDTHS if name != tensor.dtype])
    tensors[one] = tensor._replace(dtype=dtype, data=(tensor.data * 8)[: count * WIDTHS[dtype]])
    return f"{one} of dtype {dtype}, not {tensor.dtype}"


IN_TENSORS: dict[str, Callable[[dict[str, Tensor], Random], str]] = {
    "flipped bits": _flip_bits,
    "scales": _spoil_scales,
    "swapped tensors": _swap_tensors,
    "swapped layers": _swap_layers,
    "duplicated tensor": _duplicate,
    "missing tensor": _remove,
    "renamed tensor": _rename,
    "other shape": _reshape,
    "other dtype": _retype,
}

# Headers: the rest of the file stays as it is


def _spoil_length(content: bytes, random: Random) -> tuple[bytes, str]:
    size = int.from_bytes(content[:8], "little")
    length = random.choice((0, 1, size - 1, size + 1, size // 2, len(content), 2**40, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + content[8:], f"length of the header {length}, not {size}"


def _spoil_header_bytes(content: bytes, random: Random) -> tuple[bytes, str]:
    size, data = int.from_bytes(content[:8], "little"), bytearray(content)
    places = [8 + random.randrange(size) for _ in range(random.choice((1, 1, 4)))]
    for place in places:
        data[place] = random.randrange(256)
    return bytes(data), f"bytes {places} of the header"


def _spoil_entry(content: bytes, random: Random) -> tuple[bytes, str]:
    header, data = parse(content)
    name, other = random.sample([key for key in header if key != "__metadata__"], 2)
    entry, before = header[name], json.dumps(header[name])
    begin, end = entry["data_offsets"]
    match random.choice(("offsets", "overlap", "shape", "dtype", "swap")):
        case "offsets":
            step = random.choice((1, 4, 64, 2**40))
            entry["data_offsets"] = random.choice(
                (
                    [begin + step, end + step],
                    [begin, end + step],
                    [end, begin],
                    [-begin - 1, end],
                    [begin, 2**63],
                )
            )
        case "overlap":
            entry["data_offsets"] = list(header[other]["data_offsets"])
        case "shape":
            shape = list(entry["shape"])
            place = random.randrange(len(shape))
            shape[place] = random.choice((0, -1, shape[place] + 1, shape[place] * 2, *HUGE))
            entry["shape"] = shape
        case "dtype":
            entry["dtype"] = random.choice([*WIDTHS, "F8_E4M3", "X9", ""])
        case "swap":
            header[name], header[other] = header[other], header[name]
            return build(header, data), f"entries of {name} and {other} swapped"
    return build(header, data), f"entry of {name} {json.dumps(entry)}, not {before}"


def _spoil_metadata(content: bytes, random: Random) -> tuple[bytes, str]:
    header, data = parse(content)
    metadata = header.get("__metadata__", {})
    key = random.choice([*metadata, ""])
    if not key:
        header.pop("__metadata__", None)
        return build(header, data), "no metadata"
    try:
        value = json.loads(metadata[key])
    except ValueError:
        value = metadata[key]
    if isinstance(value, (dict, list)):
        value, text = change_json(value, random)
        metadata[key] = json.dumps(value)
    else:
        metadata[key] = random.choice(("", "0", "pt", "dbf", "99"))
        text = metadata[key]
    return build(header, data), f"metadata {key}: {text}"


def _truncate(content: bytes, random: Random) -> tuple[bytes, str]:
    size = random.choice(
        (0, 4, 8, random.randrange(len(content)), random.randrange(len(content)), len(content) - 1)
    )
    return content[:size], f"{size} of {len(content)} bytes"


def _extend(content: bytes, random: Random) -> tuple[bytes, str]:
    more = random.choice((1, 8, 4096))
    return content + random.randbytes(more), f"{more} bytes more"


IN_BYTES: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
    "length of a header": _spoil_length,
    "bytes of a header": _spoil_header_bytes,
    "entry of a header": _spoil_entry,
    "metadata of a header": _spoil_metadata,
    "truncated file": _truncate,
    "extended file": _extend,
}


# JSON


def change_json(value: Any, random: Random) -> tuple[Any, str]:
    """Change one place in a JSON value; return the value and what was done."""
    places = list(_places(value))
    path = random.choice(places)
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    key, before = path[-1], parent[path[-1]]
    where = "/".join(map(str, path))
    if isinstance(parent, dict) and random.random() < 0.35:
        match random.choice(("remove", "rename", "copy")):
            case "remove":
                del parent[key]
                return value, f"{where} removed"
            case "rename":
                parent[f"{key}_"] = parent.pop(key)
                return value, f"{where} renamed {key}_"
            case "copy":
                parent[f"{key}_"] = before
                return value, f"{where} copied as {key}_"
    if isinstance(parent, dict) and len(parent) > 1 and random.random() < 0.2:
        other = random.choice([name for name in parent if name != key])
        parent[key], parent[other] = parent[other], parent[key]
        return value, f"{where} and {other} swapped"
    parent[key] = random.choice(_other_values(before, random))
    return value, f"{where} = {json.dumps(parent[key])[:60]}, not {json.dumps(before)[:60]}"


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (key,)
        yield from ((key, *path) for path in _places(child))


def _other_values(value: Any, random: Random) -> list[Any]:
    if isinstance(value, bool):
        return [not value, "true", None, 2]
    if isinstance(value, (int, float)):
        return [
            value + 1,
            value - 1,
            value + 32,
            -value,
            0,
            value * 2,
            str(value),
            value + 0.5,
            None,
            random.choice(HUGE),
        ]
    if isinstance(value, str):
        return [
            value[:-1],
            value.upper(),
            f"{value}.x",
            "",
            0,
            None,
            [value],
            "../model.safetensors",
            "x" * 10_000,
        ]
    return [None, [], {}, 0, "", [value]]
