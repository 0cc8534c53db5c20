"""A compressed folder opens with every class that the dense one opens with, and has the same tensors there."""

import copy
import functools

import pytest
import torch
from support.models.architectures import EXPERTS, GROUPED, IMAGES, SLIDING, SPEECH, TEXT, V
from support.strategies import random_factors_like
from torch import nn

transformers = pytest.importorskip("transformers")

from dbf_compile.errors import CheckpointError  # noqa: E402
from dbf_compile.integrations.renaming import layers_in  # noqa: E402
from dbf_compile.linear import (  # noqa: E402
    DoubleBinaryLinear,
    dense_linears,
    dense_weight,
    is_conv1d,
    swap_,
)

T5 = {"vocab_size": V, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
BART = {
    "vocab_size": V,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}
SPOKEN = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TOWERS = {"text_config": TEXT, "vision_config": IMAGES}
QWEN = {
    "text_config": {
        **GROUPED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 1,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 8,
    },
}
GEMMA = {"text_config": SLIDING, "vision_config": IMAGES, "mm_tokens_per_image": 4}
LLAVA = {
    "text_config": {**GROUPED, "model_type": "llama"},
    "vision_config": {**IMAGES, "model_type": "clip_vision_model"},
}
# The class that is compressed, its configuration, and classes that open the folder, with how many factored layers.
PAIRS = [
    ("LlamaForCausalLM", GROUPED, {"LlamaModel": 14, "LlamaForSequenceClassification": 14}),
    ("LlamaForCausalLM", GROUPED, {"LlamaForTokenClassification": 14, "LlamaForQuestionAnswering": 0}),
    ("LlamaModel", GROUPED, {"LlamaForCausalLM": 14, "LlamaForSequenceClassification": 14}),
    ("BertModel", TEXT, {"BertForSequenceClassification": 13, "BertForMaskedLM": 12}),
    ("BertForMaskedLM", TEXT, {"BertModel": 12, "BertForSequenceClassification": 12, "BertLMHeadModel": 13}),
    ("RobertaForMaskedLM", TEXT, {"RobertaModel": 12, "RobertaForTokenClassification": 12}),
    ("GPT2LMHeadModel", TEXT, {"GPT2Model": 8, "GPT2ForSequenceClassification": 8}),
    ("T5ForConditionalGeneration", T5, {"T5EncoderModel": 6, "T5Model": 16, "T5ForTokenClassification": 6}),
    ("BartForConditionalGeneration", BART, {"BartModel": 16, "BartForCausalLM": 10}),
    ("WhisperForConditionalGeneration", SPEECH, {"WhisperModel": 32, "WhisperForAudioClassification": 12}),
    ("Wav2Vec2ForCTC", SPOKEN, {"Wav2Vec2Model": 7, "Wav2Vec2ForSequenceClassification": 7}),
    ("CLIPModel", TOWERS, {"CLIPTextModel": 12, "CLIPVisionModel": 12, "CLIPForImageClassification": 12}),
    ("SiglipModel", TOWERS, {"SiglipTextModel": 13, "SiglipVisionModel": 14}),
    ("Qwen2VLForConditionalGeneration", QWEN, {"Qwen2VLModel": 20, "Qwen2VLTextModel": 14}),
    ("Gemma3ForConditionalGeneration", GEMMA, {"Gemma3Model": 28}),
    ("LlavaForConditionalGeneration", LLAVA, {"LlavaModel": 28}),
    ("ViTForImageClassification", {**IMAGES, "num_labels": 64}, {"ViTModel": 12}),
    ("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 2}, {"MixtralModel": 8}),
]


@functools.cache
def folders(index, place):
    """Return the folder of a factored model, and of a dense one of the same weights."""
    name, config, _ = PAIRS[index]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    dense = kind(kind.config_class(**config)).eval()
    factored = copy.deepcopy(dense)
    head = dense.get_output_embeddings()
    factors = {
        key: random_factors_like(dense_weight(layer), 40, seed=seed)
        for seed, (key, layer) in enumerate(dense_linears(dense).items())
        if layer is not head
    }
    with torch.no_grad():
        for key, layer in factors.items():
            dense_weight(dense.get_submodule(key)).copy_(layer.dense())
    paths = place / str(index) / "factored", place / str(index) / "dense"
    for path, model in zip(paths, (swap_(factored, factors), dense), strict=True):
        model.save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    yield tmp_path_factory.mktemp("pairs")
    folders.cache_clear()


def opened(folder, name, **options):
    torch.manual_seed(0)
    return getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)


def assert_same_weights(factored, dense, missing):
    """Assert that all parameters of both are equal and ask for gradients alike, but for factors, which ask for none."""
    parameters = dict(factored.named_parameters(remove_duplicate=False))
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        layer = factored.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, DoubleBinaryLinear) and name.endswith(".weight"):
            weight = layer.factors.dense()
            assert not any(one.requires_grad for key, one in layer.named_parameters() if key != "bias")
            original = dense.get_submodule(name.rpartition(".")[0])
            assert torch.equal(weight.T if is_conv1d(original) else weight, parameter), name
        else:
            assert parameters[name].requires_grad == parameter.requires_grad, name
            assert name in missing or torch.equal(parameters[name], parameter), name


@pytest.mark.parametrize(
    ("index", "name", "count"),
    [(index, name, count) for index, pair in enumerate(PAIRS) for name, count in pair[2].items()],
    ids=[f"{pair[0]}-{name}" for pair in PAIRS for name in pair[2]],
)
def test_every_class_opens_the_folder_as_it_opens_the_dense_one(place, index, name, count):
    compressed, dense = folders(index, place)
    (factored, info), (expected, dense_info) = opened(compressed, name), opened(dense, name)
    assert sum(isinstance(module, DoubleBinaryLinear) for module in factored.modules()) == count
    assert info["missing_keys"] == dense_info["missing_keys"]
    assert info["mismatched_keys"] == dense_info["mismatched_keys"]
    assert_same_weights(factored, expected, info["missing_keys"])
    if count:
        assert len(factored.config.quantization_config.layers) == count


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=[pair[0] for pair in PAIRS])
def test_the_class_itself_finds_all_its_tensors(place, index):
    compressed, dense = folders(index, place)
    (factored, info), (expected, _) = (opened(folder, PAIRS[index][0]) for folder in (compressed, dense))
    assert not any(info.values())
    assert_same_weights(factored, expected, ())


def test_a_head_of_another_size_is_new_and_dense_where_that_is_allowed(place):
    name = "ViTForImageClassification"
    compressed, dense = folders([pair[0] for pair in PAIRS].index(name), place)
    options = {"num_labels": 10, "ignore_mismatched_sizes": True}
    (factored, info), (expected, dense_info) = (
        opened(folder, name, **options) for folder in (compressed, dense)
    )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    assert mismatched == {key for key, *_ in dense_info["mismatched_keys"]}
    assert type(factored.classifier) is nn.Linear and factored.classifier.weight.requires_grad
    assert_same_weights(factored, expected, mismatched)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        opened(compressed, name, num_labels=10)


def test_fewer_blocks_are_as_many_as_asked_for(place):
    model, info = opened(folders(0, place)[0], "LlamaForCausalLM", num_hidden_layers=1)
    assert sum(isinstance(module, DoubleBinaryLinear) for module in model.modules()) == 7
    assert info["missing_keys"] == set()


@pytest.mark.slow
def test_a_new_head_is_trained_by_trainer(place, tmp_path):
    model, _ = opened(folders(0, place)[0], "LlamaForSequenceClassification", num_labels=3)
    before = model.score.weight.detach().clone()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, report_to=[], use_cpu=True, learning_rate=0.1, save_strategy="no"
    )
    rows = [{"input_ids": torch.arange(1, 9), "labels": 1}] * 2
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(model.score.weight, before)
    trainer.save_model(tmp_path / "trained")
    again, _ = opened(tmp_path / "trained", "LlamaForSequenceClassification")
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_name_that_the_files_do_not_have_either_is_damage():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    table = {"model.layers.7.mlp.up_proj": {"mid_features": 8, "shares_first_stage_with": None}}
    assert layers_in(model, table, ()) == {}  # of another class, as far as is known
    model.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match=r"layers\.7"):
        layers_in(model, table, ())
