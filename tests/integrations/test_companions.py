"""Companions of a model: every file but weights, caches, states of training and other models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from dbf_compile.integrations.companions import companions, copy_companions

_TAKEN = """
tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json vocab.txt
merges.txt spiece.model sentencepiece.bpe.model source.spm target.spm qwen.tiktoken tekken.json chat_template.jinja
additional_chat_templates/tools.jinja generation_config.json preprocessor_config.json processor_config.json
video_preprocessor_config.json feature_extractor_config.json image_processor.py modeling_own.py configuration_own.py
own/layers.py LICENSE LICENSE.txt NOTICE README.md USE_POLICY.md assets/picture.png audio_examples/a.wav
modules.json config_sentence_transformers.json sentence_bert_config.json 1_Pooling/config.json 2_Normalize/empty
3_Dense/config.json 3_Dense/model.safetensors 3_Dense/pytorch_model.bin normalizer.json phonemes.npy voices/en.npz
"""
_LEFT = """
config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin
pytorch_model.bin.index.json consolidated.00.pth model.gguf tf_model.h5 flax_model.msgpack rust_model.ot
onnx/model.onnx onnx/config.json original/consolidated.00.pth original/params.json openvino/openvino_model.bin
optimizer.pt scheduler.pt rng_state.pth training_args.bin trainer_state.json checkpoint-500/model.safetensors
checkpoint-500/tokenizer.json runs/events.out.tfevents.1 events.out.tfevents.2 .git/config .cache/huggingface/x
.gitattributes __pycache__/modeling_own.pyc dbf_report.json dbf_report.html configuration_dbf.py modeling_dbf.py
other/config.json other/nested/model.safetensors
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name in (*_TAKEN.split(), *_LEFT.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 3, "path": "3_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_what_belongs_to_a_model_is_known_by_what_it_is_not(source: Path) -> None:
    names = {path.as_posix() for path in companions(source)}
    assert names == set(_TAKEN.split())


def test_links_are_followed_and_broken_ones_left(source: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("content")
    (source / "linked.json").symlink_to(blob)
    (source / "broken.json").symlink_to(tmp_path / "nowhere")
    (source / "assets" / "circle").symlink_to(source)
    copy_companions(source, tmp_path / "copy")
    copy = tmp_path / "copy" / "linked.json"
    assert copy.read_text() == "content" and not copy.is_symlink()
    assert (
        not (tmp_path / "copy" / "broken.json").exists()
        and not (tmp_path / "copy" / "assets" / "circle").exists()
    )


@pytest.mark.parametrize("content", ["", "{}", "[3]", '[{"path": 3}]', "[{}]"])
def test_modules_that_cannot_be_read_are_none(content: str, source: Path) -> None:
    (source / "modules.json").write_text(content)
    names = {path.as_posix() for path in companions(source)}
    assert "3_Dense/config.json" not in names and "1_Pooling/config.json" in names
