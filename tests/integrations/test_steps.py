"""Steps over our cache: which models and settings fit, and how transformers would choose tokens."""

import pytest
import torch
from support.models.tiny import tiny_llama

transformers = pytest.importorskip("transformers")
from dbf_compile.integrations import steps  # noqa: E402
from dbf_compile.integrations.generation_settings import UnsuitedError  # noqa: E402


def test_a_probe_finds_the_sizes_of_the_cache():
    model = tiny_llama()
    config = model.config
    size = (config.num_key_value_heads, config.head_dim, config.head_dim, torch.float32)
    before = config._attn_implementation
    assert steps.probe(model) == [size] * config.num_hidden_layers
    assert config._attn_implementation == before


def test_a_model_that_computes_something_else_is_found_out():
    model = tiny_llama()
    own = model.model.layers[0].self_attn.forward

    def other(*args, **kwargs):
        attended, weights = own(*args, **kwargs)
        return (-attended if kwargs["attention_mask"] is not None else attended), weights

    model.model.layers[0].self_attn.forward = other
    with pytest.raises(UnsuitedError, match="something else"):
        steps.probe(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.register_forward_hook(lambda *_: None), "hooks"),
        (lambda model: setattr(model.config, "layer_types", ["chunked_attention"]), "a state of their own"),
        (lambda model: setattr(model.config, "rope_parameters", {"rope_type": "dynamic"}), "rotary"),
    ],
    ids=["hooks", "layers", "rope"],
)
def test_reasons_are_given(change, words):
    model = tiny_llama()
    change(model)
    assert words in steps.why_unsuited(model)


def test_fingerprints_tell_shapes_and_settings_apart():
    model = tiny_llama()
    assert steps.fingerprint(model) == steps.fingerprint(tiny_llama())
    assert steps.fingerprint(model) != steps.fingerprint(tiny_llama(layers=1))
    assert steps.fingerprint(model) != steps.fingerprint(tiny_llama(rms_norm_eps=1e-3))


def test_a_copy_of_a_folder_has_the_same_programs():
    model, copy = tiny_llama(), tiny_llama()
    model.config._name_or_path, copy.config._name_or_path = "here", "there"
    assert steps.fingerprint(model) == steps.fingerprint(copy)
