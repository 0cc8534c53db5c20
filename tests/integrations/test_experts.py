"""Experts of a mixture as linear layers: the same function, no copy, and the stock kinds of transformers."""

import pytest
import torch
from support.models.architectures import random_model
from support.models.tiny import error_of
from torch import nn

from dbf_compile.integrations.experts import Experts, is_fused, linearize_experts_
from dbf_compile.linear import dense_linears

pytest.importorskip("transformers")


@pytest.fixture(
    params=["mixtral", "qwen3_moe", "gpt_oss"]
)  # gpt_oss: biases, weights [K, N], gate and up interleaved
def model(request):
    model = random_model(request.param).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)  # biases and sinks start at zero or nothing
    return model


TOKENS = torch.arange(1, 21)[None]


def test_unfused_experts_compute_the_same_from_the_same_memory(model):
    expected = model(TOKENS).logits
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    count = sum(p.numel() for p in model.parameters())
    names = linearize_experts_(model)
    assert len(names) == 2 and all(isinstance(model.get_submodule(name), Experts) for name in names)
    # The same products, of the tokens of an expert at a time.
    assert error_of(model(TOKENS).logits, expected) < 1e-5
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == pointers
    assert sum(p.numel() for p in model.parameters()) == count
    assert linearize_experts_(model) == []


def test_every_expert_is_two_linear_layers(model):
    before = len(dense_linears(model))
    linearize_experts_(model)
    names = set(dense_linears(model))
    assert len(names) - before == 2 * 4 * 2
    assert "model.layers.1.mlp.experts.down_proj.3" in names


def test_experts_that_no_token_goes_to_and_masked_places_are_left_out():
    fused = random_model("mixtral").model.layers[0].mlp.experts.requires_grad_(False)
    x, index = torch.randn(5, 64), torch.tensor([[1, 4], [1, 1], [4, 4], [1, 4], [4, 1]])
    shares = torch.rand(5, 2)
    expected = fused(x, index.clamp_max(3), shares * (index < 4))
    unfused = Experts(fused)
    called = []
    for place, layer in enumerate(unfused.down_proj):
        layer.register_forward_hook(lambda *_, place=place: called.append(place))
    assert error_of(unfused(x, index, shares), expected) < 1e-5
    assert called == [1]  # 4 is no expert here
    assert torch.equal(unfused(x[:0], index[:0], shares[:0]), x[:0])


def test_other_modules_are_no_experts():
    assert not is_fused(nn.Linear(3, 3))
    assert linearize_experts_(nn.Sequential(nn.Linear(3, 3))) == []


def test_a_copy_is_whole(model):
    import copy

    linearize_experts_(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS).logits, model(TOKENS).logits)
    first, second = (m.model.layers[0].mlp.experts for m in (model, copied))
    assert first.fused is not second.fused
