"""The disk format: what is saved comes back, sharing included, and files are replaced as a whole."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.strategies import double_binary_factors, random_factors

from dbf_compile import checkpoint
from dbf_compile.errors import CheckpointError
from dbf_compile.factors import FIRST_STAGE, TENSOR_NAMES, DoubleBinaryFactors
from dbf_compile.linear import DoubleBinaryLinear

# One folder for all examples of a test: each example overwrites the file of the one before.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

layer_names = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
models = st.dictionaries(layer_names, double_binary_factors(), min_size=1, max_size=4)


def same_content(left: DoubleBinaryFactors, right: DoubleBinaryFactors) -> bool:
    pairs = zip(left.tensors().values(), right.tensors().values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def shares(left: DoubleBinaryFactors, right: DoubleBinaryFactors) -> bool:
    return all(getattr(left, name) is getattr(right, name) for name in FIRST_STAGE)


@given(models)
@one_folder
def test_what_is_saved_comes_back(tmp_path: Path, factors: dict[str, DoubleBinaryFactors]) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(factors, path)
    loaded = checkpoint.load(path)
    assert list(loaded) == list(factors)  # in order
    assert all(same_content(loaded[name], factors[name]) for name in factors)


@given(double_binary_factors(out_features=st.just(7)), st.sampled_from([(1, 6), (2, 3, 2), (7,)]))
@one_folder
def test_layers_of_one_split_share_their_first_stage(
    tmp_path: Path, factors: DoubleBinaryFactors, rows: tuple[int, ...]
) -> None:
    path = tmp_path / "model.safetensors"
    saved = {str(i): part for i, part in enumerate(factors.split(rows))}
    checkpoint.save(saved, path)
    loaded = checkpoint.load(path)
    assert all(same_content(loaded[name], saved[name]) for name in saved)
    assert all(shares(part, loaded["0"]) for part in loaded.values())
    # Stored once: the file holds the bits of the whole, not of its parts.
    assert 8 * data_bytes(path) == factors.bits()


@given(double_binary_factors())
@one_folder
def test_the_file_holds_the_bits_that_are_counted(tmp_path: Path, factors: DoubleBinaryFactors) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({"layer": factors}, path)
    assert 8 * data_bytes(path) == factors.bits()


def data_bytes(path: Path) -> int:
    content = path.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


def test_equal_but_separate_first_stages_stay_separate(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({"a": random_factors(33, 5, 3), "b": random_factors(33, 5, 3)}, path)
    loaded = checkpoint.load(path)
    assert loaded["a"].signs_in is not loaded["b"].signs_in


def test_one_layer_under_two_names(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    factors = random_factors(33, 5, 3)
    checkpoint.save({"encoder": factors, "decoder": factors}, path)
    loaded = checkpoint.load(path)
    assert same_content(loaded["encoder"], factors) and same_content(loaded["decoder"], factors)
    assert shares(loaded["encoder"], loaded["decoder"])


def test_strides_are_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = random_factors(33, 5, 3).tensors()
    strided = DoubleBinaryFactors(
        **{
            n: t.T.contiguous().T if t.dim() == 2 else torch.stack((t, t), -1)[..., 0]
            for n, t in tensors.items()
        }
    )
    assert not strided.signs_in.is_contiguous()
    checkpoint.save({"layer": strided}, path)
    assert same_content(checkpoint.load(path)["layer"], strided)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    factors = random_factors(33, 5, 3)
    checkpoint.save({"": factors, "up": factors}, path)
    stored = load_file(path)
    assert set(stored) == {f".{name}" for name in TENSOR_NAMES} | {"up.signs_out", "up.scale_out"}
    assert torch.equal(stored[".signs_in"], factors.signs_in)


def test_load_moves_to_a_device(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({str(i): part for i, part in enumerate(random_factors(33, 5, 3).split([1, 2]))}, path)
    loaded = checkpoint.load(path, device=torch.device("meta"))
    assert {tensor.device.type for tensor in loaded["0"].tensors().values()} == {"meta"}
    assert shares(loaded["0"], loaded["1"])


def test_loaded_factors_do_not_write_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({"layer": random_factors(33, 5, 3)}, path)
    before = path.read_bytes()
    checkpoint.load(path)["layer"].scale_in.zero_()
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are read from /proc")
def test_layers_do_not_keep_the_file_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({"layer": random_factors(33, 5, 3)}, path)
    loaded = checkpoint.load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    layers = [DoubleBinaryLinear(factors) for factors in loaded.values()]
    del loaded
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert all(layer(torch.ones(3, layer.in_features)).isfinite().all() for layer in layers)


@given(
    st.dictionaries(st.text("abcdefgh ä\n", max_size=9), st.text(st.characters(exclude_categories=("Cs",))))
)
@one_folder
def test_metadata_comes_back(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({"layer": random_factors(3, 2, 3)}, path, metadata)
    assert checkpoint.read_metadata(path) == metadata


@pytest.mark.parametrize("key", checkpoint.RESERVED_KEYS)
def test_reserved_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"reserved key '{key}'"):
        checkpoint.save({"layer": random_factors(3, 2, 3)}, tmp_path / "x", {key: "mine"})


@pytest.mark.parametrize("metadata", [{"bits": 2.0}, {1: "one"}])
def test_metadata_other_than_strings_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="allowed: strings"):
        checkpoint.save({"layer": random_factors(3, 2, 3)}, tmp_path / "x", metadata)


def test_nothing_to_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no factors to save"):
        checkpoint.save({}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="'layer' on the meta device"):
        checkpoint.save({"layer": random_factors(3, 2, 3).to("meta")}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    old = random_factors(33, 5, 3)
    checkpoint.save({"layer": old}, path)

    def full_disk(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save({"layer": random_factors(33, 5, 4)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert same_content(checkpoint.load(path)["layer"], old)


def test_the_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save({"layer": random_factors(33, 5, 3)}, path)
    before, flushed = path.read_bytes(), []
    replace, fsync = Path.replace, os.fsync

    def watched_replace(source: Path, target: Path) -> None:
        assert path.read_bytes() == before  # untouched until the new one is whole …
        assert len(flushed) == 1  # … and on the disk
        assert source.stat().st_dev == path.stat().st_dev
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", watched_replace)
    checkpoint.save({"layer": random_factors(33, 5, 4)}, path)
    assert len(flushed) == 2  # the file, then the folder that names it
    assert checkpoint.load(path)["layer"].out_features == 4


def test_the_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    checkpoint.save({"layer": random_factors(33, 5, 3)}, tmp_path / "model")
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "model", tmp_path):
        with pytest.raises(CheckpointError, match=f"writing {path} failed"):
            checkpoint.save({"layer": random_factors(33, 5, 3)}, path)
