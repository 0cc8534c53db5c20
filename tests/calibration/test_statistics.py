"""Importances on disk: what is saved comes back, and other files are refused."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dbf_compile.calibration.statistics import load_importance, save_importance
from dbf_compile.errors import CheckpointError
from dbf_compile.factorizer.importance import Importance

# One folder for all examples of a test: each example overwrites the file of the one before.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
MOMENTS = st.sampled_from([None, torch.rand(3), torch.rand(5, dtype=torch.float64), torch.eye(4)])
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def equal(left, right):
    return left is right is None or (left.dtype == right.dtype and torch.equal(left, right))


@given(st.dictionaries(NAMES, st.tuples(MOMENTS, MOMENTS), max_size=4))
@one_folder
def test_what_is_saved_comes_back(tmp_path, moments):
    importance = {name: Importance(*pair) for name, pair in moments.items()}
    save_importance(importance, tmp_path / "file")
    loaded = load_importance(tmp_path / "file")
    assert list(loaded) == list(importance)
    for name, pair in moments.items():
        assert all(map(equal, loaded[name].moments().values(), pair))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="calibrate again"):
        load_importance(path)
    for content in (b"", b"text", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="written by save_importance"):
            load_importance(path)
    for header in (None, {"format": "dbf"}):
        save_file({"x": torch.ones(2)}, path, header)
        with pytest.raises(CheckpointError, match="format"):
            load_importance(path)


@pytest.mark.parametrize("layers", [None, "{", "3"], ids=["absent", "no JSON", "no list"])
def test_a_damaged_table_of_layers_is_refused(tmp_path, layers):
    header = {"format": "dbf_importance"} | ({} if layers is None else {"layers": layers})
    save_file({"a.input_second_moment": torch.ones(2)}, tmp_path / "file", header)
    with pytest.raises(CheckpointError, match="calibrate again"):
        load_importance(tmp_path / "file")


def test_a_moment_that_is_none_is_refused(tmp_path):
    path = tmp_path / "file"
    save_importance({"a": Importance(torch.ones(2))}, path)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])["__metadata__"]
    save_file({"a.input_second_moment": torch.tensor([1.0, -1.0])}, path, header)
    with pytest.raises(CheckpointError, match="negative"):
        load_importance(path)
