"""Positions and splitting of text as GGUF files say, where transformers does not read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from support.models.gguf_files import rope_factors, write_gguf
from support.models.tiny import tiny_llama
from transformers import AutoTokenizer

from dbf_compile.errors import ConversionError
from dbf_compile.integrations import pretrained


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_positions_of_llama_3_are_stretched(file: Path) -> None:
    factors = rope_factors(tiny_llama(), 32.0)
    assert 1 < factors.max() == 32
    write_gguf(file, "F32", tensors={"rope_freqs.weight": factors})
    rope = json.loads((pretrained.local_folder(file) / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == 32.0


@pytest.mark.parametrize(
    ("name", "digits"), [("smollm", ["1", "2", "3"]), ("gpt-2", ["1", "2", "3"]), ("unheard-of", None)]
)
def test_text_is_split_as_the_file_says(file: Path, name: str, digits: list[str] | None) -> None:
    write_gguf(file, entries={"tokenizer.ggml.pre": name})
    if digits is None:
        with pytest.warns(UserWarning, match="splits text as 'unheard-of'"):
            pretrained.local_folder(file)
        return
    tokenizer = AutoTokenizer.from_pretrained(pretrained.local_folder(file))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in pieces][-3:] == digits or name == "gpt-2"


@pytest.mark.parametrize(
    "options",
    [
        {"entries": {"llama.rope.scaling.type": "yarn"}},
        {"tensors": {"rope_freqs.weight": torch.linspace(1, 3, 8)}},
    ],
)
def test_positions_stretched_otherwise_are_refused(file: Path, options: dict[str, object]) -> None:
    write_gguf(file, "F32", **options)
    with pytest.raises(ConversionError, match="positions stretched"):
        pretrained.local_folder(file)
