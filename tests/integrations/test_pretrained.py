"""Folders of pretrained models: which are opened, as what, and which are refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from support.models.pretrained import QUICK, as_pickle, tiny_folder
from support.models.tiny import tiny_bert, tiny_llama

import dbf_compile
from dbf_compile.errors import CheckpointError, ConversionError, DBFError
from dbf_compile.integrations import pretrained

TOKENS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "model"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


NORM = "model.norm.weight"
REFUSED = {
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), f"missing: {NORM}"),
    "left over": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "left over: x"),
    "of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(3)})),
        r"of another shape: model.norm.weight \(3,\), not \(64,\)",
    ),
    "another class": (lambda f: edit_config(f, architectures=["LlamaModel"]), "left over: lm_head.weight"),
    "fewer layers": (lambda f: edit_config(f, num_hidden_layers=1), r"left over: model.layers.1"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=3), r"missing: model.layers.2"),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized already",
    ),
    "adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter that is not merged"),
    "no config": (lambda f: (f / "config.json").unlink(), "without config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded.*no file named"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "lla'), "cannot be loaded"),
    "a config of no model": (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "cannot be loaded",
    ),
    "another program's file": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_source_that_is_no_whole_dense_model_is_refused(kind: str, copied: Path) -> None:
    spoil, message = REFUSED[kind]
    spoil(copied)
    with pytest.raises((CheckpointError, ConversionError), match=message) as caught:
        dbf_compile.compress(copied, copied.with_name("made"), **QUICK)
    assert str(copied) in str(caught.value)
    assert {path.name for path in copied.parent.iterdir()} == {"model"}


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    for use in (pretrained.open_dense, pretrained.open_any, pretrained.tokenizer_of):
        with pytest.raises(ConversionError, match="merge_and_unload"):
            use(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_files_of_pytorch_are_read(shards: int, dense: Path, copied: Path) -> None:
    as_pickle(copied, shards)
    assert torch.equal(
        pretrained.open_dense(copied)(TOKENS).logits, pretrained.open_dense(dense)(TOKENS).logits
    )


def test_nothing_in_files_of_pytorch_is_run(copied: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.mkdir, (copied / "sprung",)

    as_pickle(copied, 1)
    torch.save({"model.norm.weight": Trap()}, copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        pretrained.open_dense(copied)
    assert not (copied / "sprung").exists()


def test_a_base_model_is_its_own_class(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    assert type(pretrained.open_dense(tmp_path)).__name__ == "BertModel"


def test_tensors_that_are_not_tied_though_the_configuration_says_so(copied: Path) -> None:
    edit_config(copied, tie_word_embeddings=True)
    model: Any = pretrained.open_dense(copied)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings and not model.all_tied_weights_keys


def test_the_dtype_is_that_of_the_configuration(copied: Path) -> None:
    edit_config(copied, dtype="bfloat16")
    assert pretrained.open_dense(copied).dtype == torch.bfloat16


MODELING = """
import torch
from transformers import {base}, LlamaForCausalLM

from .configuration_own import OwnConfig
from .helpers import SCALE


class Own{kind}({base}):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output[0].mul_(SCALE)
        return output
"""
CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""


@pytest.fixture
def own(copied: Path) -> Path:
    """A model with code of its own, which imports other files of it."""
    (copied / "modeling_own.py").write_text(MODELING.format(base="LlamaForCausalLM", kind="ForCausalLM"))
    (copied / "configuration_own.py").write_text(CONFIGURATION)
    (copied / "helpers.py").write_text("SCALE = 3\n")
    edit_config(
        copied,
        model_type="own-llama",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    return copied


def test_code_of_a_model_is_run_where_it_is_trusted_and_goes_along(own: Path, monkeypatch: Any) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConversionError, match=r"code of its own.*trust_remote_code=True"):
        dbf_compile.compress(own, own.with_name("made"), **QUICK)
    expected = pretrained.open_dense(own, trust_remote_code=True)(TOKENS).logits
    made = dbf_compile.compress(own, own.with_name("made"), trust_remote_code=True, **QUICK)
    shutil.rmtree(own)
    model = AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert (model(TOKENS).logits - expected).norm() < 0.6 * expected.norm()
    facts = dbf_compile.inspection.inspect(made.folder, trust_remote_code=True)
    assert facts["verified"] and len(facts["layers"]) == 8
    with pytest.raises(DBFError, match="code of its own"):
        dbf_compile.inspection.inspect(made.folder)


def test_a_model_in_memory_takes_its_code_along(own: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)
    made = dbf_compile.compress(model, tmp_path / "made", **QUICK)
    names = {path.name for path in made.folder.iterdir()}
    assert {"modeling_own.py", "configuration_own.py", "helpers.py"} <= names
    assert (
        type(AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True)).__name__
        == "OwnForCausalLM"
    )


def test_a_model_opened_again_shares_its_tensors() -> None:
    model = tiny_llama()
    twin = pretrained.reopened(model)
    assert twin.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()  # type: ignore[union-attr]
    assert twin is not model and not twin.training and not any(p.requires_grad for p in twin.parameters())
