"""Headers of GGUF files: read whole, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")

from support.models.gguf_files import write_gguf

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.integrations.gguf_header import read_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_header_says_what_the_package_gguf_reads(file: Path) -> None:
    import gguf

    write_gguf(file, entries={"general.name": "ä", "x.flag": True, "x.rate": 0.5})
    header, reader = read_header(file), gguf.GGUFReader(file)
    assert header.architecture == "llama" and header.of_model("block_count") == 2
    assert header.metadata["general.name"] == "ä"
    assert header.metadata["x.flag"] is True and header.metadata["x.rate"] == 0.5
    assert header.metadata["tokenizer.ggml.merges"] == ["a b"]
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in reader.tensors]
    assert [header.content + tensor.offset for tensor in header.tensors] == [
        tensor.data_offset for tensor in reader.tensors
    ]
    assert header.weights == sum(int(tensor.n_elements) for tensor in reader.tensors)


def test_a_part_of_a_model_is_refused(file: Path) -> None:
    write_gguf(file, entries={"split.count": 2})
    with pytest.raises(ConversionError, match=r"one of 2 parts of a model; .*llama-gguf-split"):
        read_header(file)


def cut_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def other(file: Path) -> None:
    file.write_bytes(b"PK" + file.read_bytes())


def lengths(file: Path) -> None:
    """Give the first key a length of 2^63."""
    content = bytearray(file.read_bytes())
    content[24:32] = b"\x00" * 7 + b"\x80"
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_header, "which is cut short"),
        (lengths, "which is cut short"),
        (other, "which is no GGUF file"),
    ],
)
def test_damaged_files_are_refused(file: Path, damage: Any, message: str) -> None:
    write_gguf(file)
    damage(file)
    with pytest.raises((ConversionError, CheckpointError), match=message):
        read_header(file)


@pytest.mark.parametrize("size", range(4, 5000, 499))
def test_no_beginning_of_a_header_is_taken_for_a_whole(file: Path, size: int) -> None:
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"which is cut short .*wait until it is written"):
        read_header(file)
