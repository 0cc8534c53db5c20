"""Coverage counts every weight once and says why it is not factored."""

import pytest
from support.models.tiny import tiny_gpt2, tiny_llama

from dbf_compile.compression.coverage import coverage
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.options import CompressionConfig

pytest.importorskip("transformers")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_shares_add_up_and_shared_weights_count_once(make):
    model, config = make(), CompressionConfig(bits_per_weight=4.0)
    names = {name for job in LayerFactorizer(config).jobs(model) for name in job.names}
    covered = coverage(model, names, config)
    assert covered["weights"] == sum(parameter.numel() for parameter in model.parameters())
    assert covered["share"] + sum(row["share"] for row in covered["dense"]) == pytest.approx(1.0)
    assert [row["weights"] for row in covered["dense"]] == sorted(
        (r["weights"] for r in covered["dense"]), reverse=True
    )
    reasons = {row["name"]: row["reason"] for row in covered["dense"]}
    if make is tiny_llama:
        assert reasons["model.embed_tokens"] == reasons["lm_head"] == "too small to gain"
    else:
        assert "lm_head" not in reasons  # it is the embedding
        assert reasons["transformer.wte"] == "too small to gain"
    assert reasons["all norms and biases"] == "norm or bias"


def test_layers_that_stay_dense_say_why():
    model = tiny_llama(layers=1)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.k_proj.weight = attention.v_proj.weight
    config = CompressionConfig(skip=("*o_proj",), overrides={"*gate_proj": 0.1})
    covered = coverage(model, {"model.layers.0.mlp.up_proj"}, config)
    reasons = {row["name"]: row["reason"] for row in covered["dense"]}
    assert reasons["model.layers.0.self_attn.o_proj"] == "skipped by name"
    assert reasons["model.layers.0.self_attn.k_proj"] == "tied to another layer"
    assert reasons["model.layers.0.mlp.gate_proj"].startswith("too small to gain")
    assert reasons["model.layers.0.mlp.down_proj"] == "left dense"
    assert "model.layers.0.mlp.up_proj" not in reasons
    assert mlp.up_proj.weight.numel() == pytest.approx(covered["share"] * covered["weights"])
