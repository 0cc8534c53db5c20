"""Models that text is generated with: what they say of themselves, and that a folder is opened only when it is needed."""

import pytest
import torch
from support.models.pretrained import tiny_folder
from support.models.tiny import tiny_llama
from torch import nn

from dbf_compile.calibration.limits import Limits
from dbf_compile.errors import ConversionError
from dbf_compile.text_model import TextModel, opened, tokenizer_of, weight_bytes

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def test_a_model_in_memory_says_what_it_is():
    model = tiny_llama().train()
    about = TextModel(model, None, CPU)
    assert about.is_open and about.model is about.source is model and not model.training
    assert about.generation_config is model.generation_config
    assert (about.name, about.device, about.answers) == ("LlamaForCausalLM", CPU, False)
    assert about.limits == Limits.of(model) and about.weight_bytes == weight_bytes(model)
    about.keep(None, None)  # of no folder: nothing is kept


def test_tensors_that_layers_share_count_once():
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert weight_bytes(layers) == 2 * 8 * 8 * 4
    layers[1].weight = layers[0].weight
    assert weight_bytes(layers) == 8 * 8 * 4


def test_what_generates_no_text_is_refused():
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ConversionError, match="generates no text"):
        TextModel(transformers.BertModel(config), None, CPU)


def test_a_folder_is_opened_where_nothing_was_kept_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path / "cache"))
    folder = tiny_folder(tmp_path / "folder", layers=1)
    about, tokenizer = opened(folder, None, CPU, compiled=True, trust=False, progress=False)
    assert about.is_open and tokenizer("the")["input_ids"] == tokenizer_of(folder)("the")["input_ids"]
    assert opened(folder, "mine", CPU, compiled=True, trust=False, progress=False)[1] == "mine"
    assert not list(tmp_path.glob("cache/**/*"))
