"""Files that are no checkpoint, or a damaged one: each is refused with an error that says why."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251  to make files that must be refused
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.strategies import random_factors
from torch import Tensor

from dbf_compile import checkpoint
from dbf_compile.errors import CheckpointError
from dbf_compile.factors import DoubleBinaryFactors

# One folder for all examples of a test: each example overwrites the file of the one before.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"short", "no safetensors file"),
        (b"PK\x03\x04" + bytes(100), "no safetensors file"),
        (pickle.dumps({"weight": [1.0] * 100}), "no safetensors file"),
        (struct.pack("<Q", 200) + b'{"__metadata__"', "cut short or damaged"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short or damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model"
    path.write_bytes(content)
    for read in (checkpoint.load, checkpoint.read_metadata):
        with pytest.raises(CheckpointError, match=f"{path}: .*{message}"):
            read(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"layer": Trap()}, tmp_path / "model.bin")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Trap()))
    for name in ("model.bin", "model.pkl"):
        with pytest.raises(CheckpointError, match="no safetensors file"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such file"):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: a folder"):
        checkpoint.load(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_bytes(b"secret")

    def deny(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # The user root may read everything, so permissions alone would not do.
    monkeypatch.setattr(checkpoint, "safe_open", deny)
    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(CheckpointError, match=r"a file that cannot be opened \(.*Permission denied"):
        checkpoint.load(tmp_path / "model")


def test_safetensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    for header in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(2, 2)}, tmp_path / "model", header)
        with pytest.raises(CheckpointError, match="a safetensors file of another kind"):
            checkpoint.load(tmp_path / "model")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of three layers: "k" shares its first stage with "q", "up" stands alone."""
    q, k = random_factors(33, 5, 7).split([4, 3])
    path = tmp_path / "model.safetensors"
    checkpoint.save({"q": q, "k": k, "up": random_factors(40, 31, 6)}, path)
    return path


def rewrite(
    path: Path,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    layers: Callable[[dict[str, dict[str, Any]]], object] = lambda layers: None,
    header: dict[str, str] | None = None,
) -> None:
    """Write the checkpoint again after changing its tensors, its layers or its header in place."""
    stored = load_file(path)
    content = path.read_bytes()
    strings = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    described = json.loads(strings["layers"])
    tensors(stored)
    layers(described)
    save_file(stored, path, {**strings, "layers": json.dumps(described), **(header or {})})


def assert_refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert all(part in str(caught.value) for part in (str(path), *parts)), str(caught.value)


def test_an_unchanged_rewrite_loads(path: Path) -> None:
    rewrite(path)
    assert list(checkpoint.load(path)) == ["q", "k", "up"]


@pytest.mark.parametrize("version", ["2", "0", "", "1.0"])
def test_other_versions_are_refused(path: Path, version: str) -> None:
    rewrite(path, header={"format_version": version})
    assert_refused(path, f"format_version={version!r}", "update dbf_compile")
    with pytest.raises(CheckpointError, match="format_version"):
        checkpoint.read_metadata(path)


@pytest.mark.parametrize("key", ["q.signs_in", "k.scale_out", "up.scale_mid"])
def test_a_missing_tensor_is_noticed(path: Path, key: str) -> None:
    rewrite(path, tensors=lambda stored: stored.pop(key))
    assert_refused(path, f"no tensor '{key}'")


def test_an_extra_tensor_is_noticed(path: Path) -> None:
    rewrite(path, tensors=lambda stored: stored.update({"k.signs_in": stored["q.signs_in"].clone()}))
    assert_refused(path, "1 tensors that belong to no layer, such as 'k.signs_in'")


@pytest.mark.parametrize(
    ("key", "dtype", "name"),
    [
        ("q.signs_in", torch.int64, "I64"),
        ("up.scale_in", torch.float64, "F64"),
        ("up.scale_in", torch.int16, "I16"),
        ("k.signs_out", torch.float32, "F32"),
    ],
)
def test_a_wrong_dtype_is_noticed(path: Path, key: str, dtype: torch.dtype, name: str) -> None:
    rewrite(path, tensors=lambda stored: stored.update({key: stored[key].to(dtype)}))
    assert_refused(path, f"'{key}' of dtype {name}")


def test_scales_of_two_dtypes_are_noticed(path: Path) -> None:
    rewrite(path, tensors=lambda stored: stored.update({"up.scale_in": stored["up.scale_in"].float()}))
    assert_refused(path, "layer 'up'", "torch.float16", "torch.float32")


def test_a_wrong_shape_is_noticed(path: Path) -> None:
    rewrite(path, tensors=lambda stored: stored.update({"up.scale_in": stored["up.scale_in"][:-1].clone()}))
    assert_refused(path, "'up.scale_in' of shape (39,)", "allowed: (40,)")


def test_a_wrong_size_is_noticed(path: Path) -> None:
    rewrite(path, layers=lambda layers: layers["up"].update(out_features=7))
    assert_refused(path, "'up.signs_out' of shape (6, 1)", "allowed: (7, 1)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_noticed(path: Path, value: float) -> None:
    rewrite(path, tensors=lambda stored: stored["up.scale_mid"][3:4].fill_(value))
    assert_refused(path, "layer 'up': scale_mid with NaN or infinite entries")


def test_padding_bits_are_noticed(path: Path) -> None:
    rewrite(path, tensors=lambda stored: stored["q.signs_in"][2, 1:].fill_(2))
    assert_refused(path, "layer 'q': signs_in with bits set behind column 33")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"q": 3}',
        '{"q": {}}',
        '{"q": {"colour": 1}}',
        "[" * 100_000,
        '{"q": null}',
    ],
    ids=lambda text: text[:9] or "empty",
)
def test_a_broken_list_of_layers_is_noticed(path: Path, text: str) -> None:
    rewrite(path, header={"layers": text})
    assert_refused(path, "an unreadable list of layers")


def test_a_list_of_no_layers_is_noticed(path: Path) -> None:
    rewrite(path, header={"layers": "{}"})
    assert_refused(path, "an empty list of layers")


def test_a_missing_list_of_layers_is_noticed(path: Path) -> None:
    save_file(load_file(path), path, {"format": "dbf", "format_version": "1"})
    assert_refused(path, "an unreadable list of layers")


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "33", None, [], float("nan")])
def test_a_size_that_is_no_size_is_noticed(path: Path, size: object) -> None:
    rewrite(path, layers=lambda layers: layers["q"].update(in_features=size))
    assert_refused(path, f"layer 'q' with in_features={size!r}")


@pytest.mark.parametrize("name", ["v", 3, ["q"], {}])
def test_sharing_with_nobody_is_noticed(path: Path, name: object) -> None:
    rewrite(path, layers=lambda layers: layers["k"].update(shares_first_stage_with=name))
    assert_refused(path, f"layer 'k' shares its first stage with {name!r}, which is not in the file")


@pytest.mark.parametrize(
    ("one", "other"), [("q", "q"), ("q", "k"), ("up", "k")], ids=["itself", "a cycle", "a chain"]
)
def test_sharing_in_a_circle_or_a_chain_is_noticed(path: Path, one: str, other: str) -> None:
    rewrite(path, layers=lambda layers: layers[one].update(shares_first_stage_with=other))
    assert_refused(path, "which does not store one")


def test_sharing_between_other_sizes_is_noticed(path: Path) -> None:
    rewrite(path, layers=lambda layers: layers["k"].update(shares_first_stage_with="up"))
    assert_refused(path, "layer 'k' with in_features=33, mid_features=5", "in_features=40, mid_features=31")


@given(st.data())
@settings(one_folder, max_examples=300)
def test_flipped_bytes_are_noticed_or_harmless(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    # Most of a small file is header: flips hit names, sizes and offsets as well as numbers.
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert_refused_or_valid(path.with_name("flipped"), bytes(content))


@given(st.data())
@one_folder
def test_a_file_cut_anywhere_is_refused(path: Path, data: st.DataObject) -> None:
    content = path.read_bytes()
    cut = path.with_name("cut")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert_refused(cut, "no safetensors file" if cut.stat().st_size < 9 else "cut short or damaged")


@given(st.data())
@one_folder
def test_flipped_letters_of_the_list_of_layers_are_noticed_or_harmless(
    path: Path, data: st.DataObject
) -> None:
    content = path.read_bytes()
    start, end = content.index(b"in_features"), content.index(b'"}', content.index(b"in_features"))
    place = data.draw(st.integers(start, end))
    letter = data.draw(st.sampled_from(b'0123456789{}[]",:\\.-+eEtfn qku'))
    assert_refused_or_valid(
        path.with_name("flipped"), content[:place] + bytes([letter]) + content[place + 1 :]
    )


def assert_refused_or_valid(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        loaded = checkpoint.load(path)
    except CheckpointError:
        return
    for factors in loaded.values():
        DoubleBinaryFactors(**factors.tensors())  # checks itself
