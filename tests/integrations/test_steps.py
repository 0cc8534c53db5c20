"""Steps over our cache: which models and settings fit, and how transformers would choose tokens."""

import pytest
import torch
from support.models.tiny import tiny_llama

from dbf_compile.options import Sampling

transformers = pytest.importorskip("transformers")
from dbf_compile.integrations import steps  # noqa: E402


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
    with pytest.raises(steps.UnsuitedError, match="something else"):
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


def test_settings_are_those_that_transformers_would_use():
    model = tiny_llama()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1, eos_token_id=[2, 3]
    )
    greedy, ends = steps.sampling_of(model, Sampling(do_sample=False), {})
    assert greedy == Sampling(do_sample=False, repetition_penalty=1.1) and ends == {2, 3}
    drawn, ends = steps.sampling_of(model, Sampling(do_sample=True, top_p=0.5), {"eos_token_id": 7})
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.5, 50) and ends == {7}
    with pytest.raises(steps.UnsuitedError, match="nonsense"):
        steps.sampling_of(model, Sampling(), {"nonsense": 1})
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(steps.UnsuitedError, match="no_repeat_ngram_size"):
        steps.sampling_of(model, Sampling(), {})


def test_fingerprints_tell_shapes_and_settings_apart():
    model = tiny_llama()
    assert steps.fingerprint(model) == steps.fingerprint(tiny_llama())
    assert steps.fingerprint(model) != steps.fingerprint(tiny_llama(layers=1))
    assert steps.fingerprint(model) != steps.fingerprint(tiny_llama(rms_norm_eps=1e-3))
