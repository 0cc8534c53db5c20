"""save_pretrained of models that have factored layers: they load again, and configurations say what is factored."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.models.architectures import random_factored_model, random_model
from support.models.tiny import error_of, tiny_llama
from support.strategies import random_factors_like

transformers = pytest.importorskip("transformers")

from dbf_compile import convert_  # noqa: E402
from dbf_compile.errors import ConversionError  # noqa: E402
from dbf_compile.factors import DoubleBinaryFactors  # noqa: E402
from dbf_compile.integrations.experts import linearize_experts_  # noqa: E402
from dbf_compile.integrations.transformers import DBFConfig  # noqa: E402
from dbf_compile.linear import dense_linears, dense_weight, swap_  # noqa: E402

TOKENS = torch.arange(1, 17)[None]


def with_shared_stages(model):
    """Return the model with random factors, q, k and v of a block sharing their first stage."""
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in dense_linears(model).items() if layer is not head}
    factors = {
        name: random_factors_like(dense_weight(layer), 40, seed=len(name)) for name, layer in layers.items()
    }
    for name, layer in factors.items():
        owner = factors.get(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj"), layer)
        if owner is not layer:
            factors[name] = DoubleBinaryFactors(
                owner.signs_in, layer.signs_out, owner.scale_in, owner.scale_mid, layer.scale_out
            )
    return swap_(model, factors).requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return with_shared_stages(tiny_llama())


def loaded_again(model, folder, **options):
    """Return the model after saving and loading it; nothing was missing, left over, or of another shape."""
    model.save_pretrained(folder, **options)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return again


def assert_same(model, again):
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    one, other = (vars(each.config.quantization_config) for each in (model, again))
    assert one == other


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "vit", "whisper", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_as_it_was_saved(kind, dtype, tmp_path):
    model = random_factored_model(kind).to(dtype)
    assert_same(model, loaded_again(model, tmp_path))


def test_shared_stages_are_stored_once_and_shared_again(llama, tmp_path):
    again = loaded_again(llama, tmp_path)
    assert_same(llama, again)
    attention = again.model.layers[1].self_attn
    assert attention.q_proj.signs_in is attention.k_proj.signs_in is attention.v_proj.signs_in
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum("layers.1.self_attn" in name and name.endswith("signs_in") for name in names) == 2
    assert torch.equal(again(TOKENS).logits, llama(TOKENS).logits)
    assert not hasattr(llama, "hf_quantizer")


def test_a_class_that_ties_nothing_itself_misses_nothing(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    layers = {"conv_dim": (32,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embedding_groups": 4}
    config = transformers.Wav2Vec2Config(vocab_size=32, num_conv_pos_embeddings=16, **sizes, **layers)
    model = with_shared_stages(transformers.Wav2Vec2ForCTC(config).eval())
    again = loaded_again(model, tmp_path)
    assert_same(model, again)
    attention = again.wav2vec2.encoder.layers[0].attention
    assert attention.q_proj.signs_in is attention.k_proj.signs_in


@pytest.mark.parametrize(
    "options",
    [
        {"max_shard_size": "20KB"},
        {"save_original_format": False},
        {"state_dict": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_saving_are_those_of_dense_models(llama, tmp_path, options):
    if "state_dict" in options:  # that of the caller is saved, not the model's own
        options = {"state_dict": {name: tensor.clone() for name, tensor in llama.state_dict().items()}}
        options["state_dict"]["model.norm.weight"] += 1
    again = loaded_again(llama, tmp_path, **options)
    assert torch.equal(again.model.norm.weight, llama.model.norm.weight + ("state_dict" in options))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 or "max_shard_size" not in options


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("factored", [False, True])
def test_linearized_experts_stay_linearized(kind, factored, tmp_path):
    model = random_model(kind).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)  # biases and sinks start at zero or nothing
    linearize_experts_(model)
    if factored:
        layers = {name: layer for name, layer in dense_linears(model).items() if ".experts.down" in name}
        swap_(model, {name: random_factors_like(dense_weight(layer), 40) for name, layer in layers.items()})
    again = loaded_again(model, tmp_path)
    assert_same(model, again)
    # Dense experts of gpt_oss were transposed views, whose products are summed in another order.
    assert error_of(again(TOKENS).logits, model(TOKENS).logits) < 1e-5


def layers_of(model):
    return set(model.config.quantization_config.layers)


def test_the_configuration_says_what_is_factored_at_any_time(llama, tmp_path):
    model = copy.deepcopy(llama)
    first = layers_of(model)
    assert len(first) == 14
    convert_(model, {"lm_head": random_factors_like(model.lm_head.weight, 40)})
    assert layers_of(model) == first | {"lm_head"}
    again = loaded_again(model, tmp_path)
    assert_same(model, again)
    for name, layer in dense_linears(tiny_llama()).items():  # dense again, in place
        parent, _, child = name.rpartition(".")
        setattr(again.get_submodule(parent), child, layer)
    again.save_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(TOKENS).logits, again(TOKENS).logits)


def test_a_wrapper_and_a_part_are_noted_under_names_of_their_own(llama, tmp_path):
    model = tiny_llama()
    wrapper = torch.nn.ModuleDict({"inner": model})
    name = "model.layers.0.mlp.up_proj"
    swap_(wrapper, {f"inner.{name}": random_factors_like(model.get_submodule(name).weight, 40)})
    assert layers_of(model) == {name}
    part = copy.deepcopy(llama)
    assert_same(part.model, loaded_again(part.model, tmp_path / "part"))
    assert_same(part, loaded_again(part, tmp_path / "whole"))


def test_a_second_method_of_quantization_is_refused_when_it_is_saved(llama, tmp_path):
    model = copy.deepcopy(llama)
    model.config.quantization_config = {"quant_method": "other"}
    convert_(model, {"lm_head": random_factors_like(model.lm_head.weight, 40)})
    with pytest.raises(ConversionError, match="quantized by other"):
        model.save_pretrained(tmp_path)


def test_dense_models_are_saved_as_ever(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert DBFConfig().layers == {}
