"""The folder of a compressed model: what is left out of its files, what is refused before it is begun, what is said of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from support.models.pretrained import tiny_folder, tiny_tokenizer
from support.models.tiny import tiny_gpt2, tiny_llama

import dbf_compile
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.integrations import folder as model_folder
from dbf_compile.options import CompressOptions
from dbf_compile.run.request import Request


def request(model: Any, output: Path, tokenizer: Any = None, **options: Any) -> Request:
    return Request.of(
        model, output, CompressOptions(device="cpu", progress=False, **options), None, None, tokenizer
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


def names_of(model: Any) -> set[str]:
    """Return the names of the tensors that are stored of a dense model."""
    compressed = model_folder.CompressedModel(model, {}, {}.__getitem__, 0.0)
    return {name for name, _, _ in model_folder._pieces(compressed)}


def test_only_what_is_another_tensor_is_left_out() -> None:
    model: Any = tiny_gpt2()
    everything = set(model.state_dict())
    assert everything - names_of(model) == {"lm_head.weight"}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # equal, and not the same
    assert names_of(model) == everything
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().flip(0))
    assert names_of(model) == everything


def test_what_from_pretrained_does_not_tie_is_stored_under_all_its_names() -> None:
    model: Any = tiny_llama()  # its configuration ties nothing
    model.lm_head.weight = model.model.embed_tokens.weight
    assert names_of(model) == set(model.state_dict())


@pytest.mark.parametrize("inside", [".", "output", "some/where"])
def test_an_output_inside_the_models_folder_is_refused(inside: str, dense: Path, tmp_path: Path) -> None:
    linked = tmp_path / "link"
    linked.symlink_to(dense)
    (dense / "some").mkdir(exist_ok=True)
    for place in (dense, linked):
        with pytest.raises(OptionError, match=r"the model's own folder|which exists"):
            request(dense, place / inside)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_is_read_only_is_refused(dense: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OptionError, match="cannot be written"):
        request(dense, tmp_path / "made")


def test_a_place_that_cannot_be_written_is_refused(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_folder.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(
        OptionError, match=rf"output in {tmp_path}, which cannot be written \(Permission denied\)"
    ):
        request(dense, tmp_path / "made")


def test_a_disk_without_room_is_refused(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OptionError, match="1,000 bytes are free"):
        request(dense, tmp_path / "made", bits=2.0)


def test_generation_settings_of_a_folder_go_along_as_they_are(dense: Path, tmp_path: Path) -> None:
    path = dense / "generation_config.json"
    content = path.read_text()
    path.write_text(
        json.dumps({**json.loads(content), "temperature": 0.5})
    )  # save_pretrained would refuse it
    try:
        options: dict[str, Any] = {"iterations": 2, "own_text": 0, "distill": 0, "progress": False}
        made = dbf_compile.compress(dense, tmp_path / "made", **options)
        assert (made.folder / path.name).read_text() == path.read_text()
    finally:
        path.write_text(content)


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["strange"] = object()
    with pytest.raises(ConversionError, match="cannot be saved"):
        request(tiny_llama(), tmp_path / "made", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_takes_its_tokenizer_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"iterations": 2, "own_text": 0, "distill": 0, "progress": False}
    made = dbf_compile.compress(tiny_llama(), tmp_path / "made", tokenizer=tiny_tokenizer(), **options)
    assert (
        AutoTokenizer.from_pretrained(made.folder)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    )
    assert "_name_or_path" not in json.loads((made.folder / "config.json").read_text())
    assert load_file(made.folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].shape == (
        64,
        0,
    )
