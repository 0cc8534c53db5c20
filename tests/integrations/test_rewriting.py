"""Rewritten folders: other content under the same names, checked as before; a tensor without a place is an error."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models.pretrained import FAST, tiny_folder

transformers = pytest.importorskip("transformers")

import dbf_compile  # noqa: E402
from dbf_compile.errors import CheckpointError  # noqa: E402
from dbf_compile.integrations import pretrained  # noqa: E402
from dbf_compile.integrations.rewriting import rewrite_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("rewriting")
    settings = {**FAST, "max_shard_size": 40_000, "mode": "independent", "own_text": 0.0}
    return dbf_compile.compress(tiny_folder(place / "dense"), place / "folder", **settings).folder


@pytest.fixture(scope="module")
def model(folder):
    return pretrained.open_any(folder)


def test_other_content_under_the_same_names(folder, model, tmp_path):
    name = "model.layers.1.mlp.down_proj.scale_out"
    other = 2 * model.get_parameter(name).detach().float()
    rewrite_model(folder, tmp_path / "new", model, {name: other})
    files = sorted(path.name for path in folder.glob("*"))
    assert files == sorted(path.name for path in (tmp_path / "new").glob("*"))
    shards = [path for path in files if path.endswith(".safetensors")]
    assert len(shards) > 1
    for shard in shards:
        before, after = (load_file(place / shard) for place in (folder, tmp_path / "new"))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            expected = other.half() if key == name else tensor
            assert after[key].dtype == tensor.dtype and torch.equal(after[key], expected)
    again = pretrained.open_any(tmp_path / "new")  # its content hash is checked
    assert torch.equal(again.get_parameter(name), other.half())
    hashes = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "new")]
    assert (
        hashes[0]["quantization_config"]["content_hash"] != hashes[1]["quantization_config"]["content_hash"]
    )


def test_tensors_that_are_shared_are_stored_once(folder, model, tmp_path):
    names = [f"model.layers.0.self_attn.{layer}_proj.scale_in" for layer in "qkv"]
    other = torch.ones_like(model.get_parameter(names[0]))
    rewrite_model(folder, tmp_path / "new", model, dict.fromkeys(names, other))
    again = pretrained.open_any(tmp_path / "new")
    assert all(torch.equal(again.get_parameter(name), other) for name in names)


def test_a_tensor_without_a_place_or_of_another_shape_is_refused(folder, model, tmp_path):
    with pytest.raises(CheckpointError, match=r"without model\.nothing"):
        rewrite_model(folder, tmp_path / "one", model, {"model.nothing": torch.ones(1)})
    with pytest.raises(CheckpointError, match="of shape"):
        rewrite_model(folder, tmp_path / "two", model, {"model.norm.weight": torch.ones(1)})
