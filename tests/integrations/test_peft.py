"""Adapters of PEFT on factored layers: nothing at first, trained alone, right gradients."""

import pytest
import torch
from support.models.tiny import factored, tiny_llama

peft = pytest.importorskip("peft")

from dbf_compile.integrations.peft import LoraDoubleBinary, add_lora  # noqa: E402

TOKENS = torch.arange(1, 17)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return factored(tiny_llama()).requires_grad_(False)


def test_new_adapters_change_nothing_and_are_all_that_is_trained(model):
    expected = model(TOKENS).logits
    adapted = add_lora(model)
    assert torch.equal(adapted(TOKENS).logits, expected)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and all("lora_" in name for name in trained)


def test_gradients_are_those_of_a_dense_layer_with_the_same_weight(model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"], init_lora_weights=False)
    adapted = add_lora(model, config)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LoraDoubleBinary)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    A, B = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    z = x.detach().clone().requires_grad_()
    (z @ layer.base_layer.factors.dense().T + 2.0 * (z @ A.T) @ B.T).square().sum().backward()
    for found, expected in ((x, z), (layer.lora_A["default"].weight, A), (layer.lora_B["default"].weight, B)):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_training_lowers_the_loss_and_the_adapter_can_be_saved_and_switched_off(model, tmp_path):
    expected = model(TOKENS).logits
    adapted = add_lora(model)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(TOKENS, labels=TOKENS).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    with adapted.disable_adapter():
        assert torch.equal(adapted(TOKENS).logits, expected)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_merging_is_refused(model):
    adapted = add_lora(model)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        adapted.base_model.model.model.layers[0].mlp.up_proj.merge()
