"""Checksums: of every dtype and shape, told apart from whatever else a file may hold; files without them are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbf_compile import checkpoint, checksums

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    checkpoint.write_tensors(tensors, {"format": "pt", **header}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 7), (1, 1, 33)], ids=str)
def test_a_file_is_as_it_was_written(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape)).to(
        dtype
    )
    path = write(tmp_path / "x", {"a": tensor, 'ä\n"b': torch.ones(3)}, own="ü")
    assert checksums.changed_tensors(path) == []
    assert load_file(path)["a"].dtype == dtype
    assert checksums.stored_checksums(path).strings == {"format": "pt", "own": "ü"}


def test_a_file_of_empty_tensors_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": torch.empty(0)})
    assert checksums.changed_tensors(path) == []


def swap(tensors: dict[str, Tensor]) -> None:
    tensors["a"], tensors["b"] = tensors["b"], tensors["a"]


CHANGES: dict[str, Any] = {
    "a number": (lambda t: t["a"].add_(1), ["a"]),
    "order in a tensor": (lambda t: t.update(a=t["a"].flip(0).contiguous()), ["a"]),
    "two tensors": (swap, ["a", "b"]),
    "another name": (lambda t: t.update(c=t.pop("a")), ["a", "c"]),
    "a tensor more": (lambda t: t.update(c=torch.ones(1)), ["c"]),
    "a tensor less": (lambda t: t.pop("b"), ["b"]),
    "another shape": (lambda t: t.update(a=t["a"].reshape(2, 3)), ["a"]),
    "another dtype": (lambda t: t.update(a=t["a"].view(torch.int32)), ["a"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_named(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": torch.arange(6.0), "b": torch.ones(6)})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change, names = CHANGES[kind]
    change(tensors)
    save_file(tensors, path, header)
    assert checksums.changed_tensors(path) == names


def test_another_header_is_a_change(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": torch.ones(3)}, own="1")
    content = path.read_bytes()
    assert content.count(b'"own":"1"') == 1
    path.write_bytes(content.replace(b'"own":"1"', b'"own":"2"'))
    assert checksums.changed_tensors(path) == ["its header"]


@pytest.mark.parametrize("table", [b"[]", b"{,", b"3 "])
def test_a_table_that_cannot_be_read_fits_nothing(table: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(3)}, path, {"checksums": table.decode()})
    assert checksums.changed_tensors(path) == ["a", "its header"]


def test_files_of_others_have_none(tmp_path: Path) -> None:
    for header in (None, {"format": "pt"}):
        save_file({"a": torch.ones(3)}, tmp_path / "x", header)
        assert checksums.changed_tensors(tmp_path / "x") is None
        assert checksums.stored_checksums(tmp_path / "x") == (header or {}, {}, {"a"})


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes string metadata in any order."""
    header = {name: name * 3 for name in "qwertyuiop"}
    files = {
        write(tmp_path / str(number), {"a": torch.ones(3)}, **header).read_bytes() for number in range(8)
    }
    assert len(files) == 1


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_told(place: int, bit: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if not path.exists():
        write(path, {"a": torch.arange(100.0), "b": torch.ones(7, dtype=torch.int8)})
        path.with_name("original").write_bytes(path.read_bytes())
    content = bytearray(path.with_name("original").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + place % (len(content) - start)] ^= 1 << bit
    path.write_bytes(bytes(content))
    assert len(checksums.changed_tensors(path) or []) == 1


def test_the_hash_of_a_folder_is_that_of_its_tensors_in_whatever_files(tmp_path: Path) -> None:
    a, b = {"a": torch.ones(3)}, {"b": torch.zeros(2)}
    tables = [checksums.stored_checksums(write(tmp_path / name, tensors)) for name, tensors in
              (("one", a), ("two", b), ("both", {**a, **b}), ("other", {"b": torch.ones(2)}))]  # fmt: skip
    one, two, both, other = tables
    assert (
        checksums.content_hash([one, two])
        == checksums.content_hash([both])
        == checksums.content_hash([two, one])
    )
    assert checksums.content_hash([one, other]) != checksums.content_hash([both])


def test_many_names_are_cut() -> None:
    assert checksums.listed(["a", "b"]) == "a, b"
    assert checksums.listed([*"abcdefg"]) == "a, b, c, d, e and 2 more"
