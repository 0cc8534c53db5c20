"""Folders tell what was changed in them since they were written: damage is refused, other changes are said."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from support.models.pretrained import QUICK  # noqa: E402
from support.models.tiny import tiny_llama  # noqa: E402

import dbf_compile  # noqa: E402
from dbf_compile.errors import CheckpointError  # noqa: E402
from dbf_compile.inspection import inspect  # noqa: E402
from dbf_compile.integrations.pretrained import open_any, open_dense  # noqa: E402

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    """Two compressions of equal shapes, each in one file and in shards."""
    place: Path = tmp_path_factory.mktemp("folders")
    for seed in (0, 1):
        model = tiny_llama()
        model.model.norm.weight.data += seed
        for name, size in (("whole", 10**9), ("shards", 30_000)):
            dbf_compile.compress(model, place / f"{name}{seed}", max_shard_size=size, **QUICK)
    return place


@pytest.fixture
def whole(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "whole0", tmp_path / "whole"))


@pytest.fixture
def shards(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "shards0", tmp_path / "shards"))


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], keep: bool = True) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        header = file.metadata() if keep else {"format": "pt"}
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, header)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def swap(tensors: dict[str, Any], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


DAMAGE: dict[str, Any] = {
    "a sign": (
        lambda t: t[f"{DOWN}.signs_in"][0].__ixor__(1),
        f"changed since it was written: {DOWN}.signs_in",
    ),
    "a scale": (lambda t: t[f"{DOWN}.scale_out"].neg_(), f"{DOWN}.scale_out"),
    "a norm": (lambda t: t["model.norm.weight"].mul_(2), "model.norm.weight"),
    "two layers": (
        lambda t: [
            swap(t, f"{DOWN}.{part}", f"{DOWN.replace('0', '1')}.{part}")
            for part in ("signs_out", "scale_out")
        ],
        f"{DOWN}.scale_out, {DOWN}.signs_out, ",
    ),
    "a name": (lambda t: t.update(x=t.pop("model.norm.weight")), "changed since it was written: x;"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors_are_named_with_their_file(kind: str, whole: Path) -> None:
    change, message = DAMAGE[kind]
    rewrite(whole, change)
    for read in (load, inspect):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(whole)
        assert str(whole / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["layers"].pop(DOWN),
        lambda c: c["layers"].update(
            {DOWN: {**c["layers"][DOWN], "mid_features": 1 + c["layers"][DOWN]["mid_features"]}}
        ),
        lambda c: c.update(bits_per_weight=1.0),
    ],
    ids=["a layer less", "another size", "another record"],
)
def test_another_table_of_layers_is_refused(change: Any, whole: Path) -> None:
    edit_config(whole, lambda config: change(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config that has changed"):
        load(whole)


METHODS: dict[str, Any] = {
    "none": lambda config: config.pop("quantization_config"),
    "without a method": lambda config: config["quantization_config"].pop("quant_method"),
    "of another method": lambda config: config["quantization_config"].update(quant_method="gptq"),
    "of a method that is no name": lambda config: config["quantization_config"].update(quant_method=["dbf"]),
    **{
        repr(value): lambda config, value=value: config.update(quantization_config=value)
        for value in (None, {}, [], "", 0, False, "dbf", [{"quant_method": "dbf"}])
    },
}


@pytest.mark.parametrize("kind", METHODS)
def test_compressed_weights_without_their_method_are_refused(kind: str, whole: Path) -> None:
    edit_config(whole, METHODS[kind])
    for read in (open_any, open_dense, inspect):
        with pytest.raises(CheckpointError, match=r"config.json: quantization_config that has changed"):
            read(whole)


def test_another_setting_is_said(whole: Path) -> None:
    edit_config(whole, lambda config: config.update(rms_norm_eps=0.5, extra=1))
    with pytest.warns(
        UserWarning, match=r"config.json has changed since the model was compressed: extra, rms_norm_eps$"
    ):
        load(whole)
    with pytest.warns(UserWarning, match="rms_norm_eps"):
        inspect(whole)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_of_another_compression_is_refused(name: str, whole: Path, folders: Path) -> None:
    shutil.copyfile(folders / "whole1" / name, whole / name)
    with pytest.raises(
        CheckpointError, match=f"{whole}: weight files that are not all those that config.json belongs to"
    ):
        load(whole)


def test_a_shard_of_another_compression_is_refused(shards: Path, folders: Path) -> None:
    names = [path.name for path in sorted(shards.glob("*.safetensors"))]
    for name in names:
        if (folders / "shards1" / name).read_bytes() != (shards / name).read_bytes():
            shutil.copyfile(folders / "shards1" / name, shards / name)
            break
    with pytest.raises(CheckpointError, match="weight files that are not all those"):
        load(shards)


def test_a_shard_that_the_index_forgot_is_missed(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != last}
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight files that are not all those"):
        load(shards)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}'),
        *('{"weight_map": {}}', '{"weight_map": {}, "metadata": ""}', '{"weight_map": {}, "metadata": [{}]}'),
    ],
)
def test_an_index_that_cannot_be_read_is_named(text: str, shards: Path) -> None:
    (shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{shards / INDEX}: "):
        load(shards)


def test_swapped_shards_are_the_same_model(shards: Path, folders: Path) -> None:
    one, other = sorted(shards.glob("*.safetensors"))[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert torch.equal(load(shards).lm_head.weight, load(folders / "shards0").lm_head.weight)


def test_a_file_that_the_user_saved_again_is_loaded_and_said(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors["model.norm.weight"].mul_(2), keep=False)
    with pytest.warns(UserWarning, match="saved again since the model was compressed"):
        model = load(whole)
    assert (model.model.norm.weight == 2).all()
    with pytest.warns(UserWarning, match="saved again"):
        assert not inspect(whole)["verified"]


def test_a_model_that_is_saved_again_or_cast_is_loaded_in_silence(whole: Path, tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=dtype)
        model.save_pretrained(tmp_path / str(number))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again = load(tmp_path / str(number))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_whole_folder_is_verified(folders: Path) -> None:
    assert inspect(folders / "whole0")["verified"] and inspect(folders / "shards1")["verified"]


def test_a_folder_without_checksums_is_loaded_in_silence(whole: Path) -> None:
    rewrite(whole, lambda tensors: None, keep=False)
    edit_config(whole, lambda config: config["quantization_config"].pop("content_hash"))
    assert load(whole) is not None and not inspect(whole)["verified"]


def test_a_folder_that_was_cut_into_other_files_is_the_same(whole: Path, folders: Path) -> None:
    """With the whole header in each, as programs do that know nothing of it."""
    with safe_open(whole / WEIGHTS, framework="pt") as file:
        header, names = file.metadata(), sorted(file.keys())
    tensors = load_file(whole / WEIGHTS)
    (whole / WEIGHTS).unlink()
    places: dict[str, str] = {}
    for number in range(3):
        part = names[number::3]
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
        save_file({name: tensors[name] for name in part}, whole / f"model-{number}.safetensors", header)
    (whole / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert inspect(whole)["verified"]
    assert torch.equal(load(whole).lm_head.weight, load(folders / "whole0").lm_head.weight)
    save_file({name: tensors[name] for name in names[0::3][:-1]}, whole / "model-0.safetensors", header)
    with pytest.raises(CheckpointError, match=f"missing: {names[0::3][-1]}"):
        load(whole)
