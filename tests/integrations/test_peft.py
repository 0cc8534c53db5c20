"""Adapters of PEFT on factored layers: every way to make and to load them, right gradients, and clear refusals."""

import copy

import pytest
import torch
from support.models.architectures import random_factored_model
from support.models.tiny import error_of
from torch import nn

peft = pytest.importorskip("peft")

from dbf_compile.errors import ConversionError  # noqa: E402
from dbf_compile.integrations.peft import LoraDoubleBinary, add_lora  # noqa: E402
from dbf_compile.linear import DoubleBinaryLinear  # noqa: E402

TOKENS = torch.arange(1, 17)[None]
SOME = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base():
    return random_factored_model("llama").requires_grad_(False)


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def config(**fields):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **fields})


@torch.no_grad()
def randomized(model):
    """Return the model after filling its adapters with values that depend on their names alone."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def adapted_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoraDoubleBinary)]


def densified(model):
    """Return a copy whose factored layers are dense ones with the same weight."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, DoubleBinaryLinear):
                dense = nn.Linear(child.in_features, child.out_features, bias=False).requires_grad_(False)
                dense.weight.copy_(child.factors.dense())
                setattr(module, name, dense)
    return model


def test_new_adapters_change_nothing_and_are_all_that_is_trained(model):
    expected = model(TOKENS).logits
    adapted = add_lora(model)
    assert torch.equal(adapted(TOKENS).logits, expected)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and all("lora_" in name for name in trained)


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_those_on_dense_layers_of_the_same_weight(model, dora):
    results = []
    for one in (densified(model), model):
        adapted = randomized(peft.get_peft_model(one, config(target_modules=SOME, use_dora=dora)))
        output = adapted(TOKENS, labels=TOKENS)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in adapted.parameters() if p.requires_grad)])
    dense, factored = results
    assert len(dense) == len(factored) == 1 + 6 * (3 if dora else 2)
    # The same sums in another order.
    assert all(error_of(one, other) < 1e-4 for one, other in zip(factored, dense, strict=True))


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, 14),
        ({"target_modules": None}, 4),
        ({"target_modules": SOME}, 6),
        ({"target_modules": r".*\.(k|o)_proj"}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 2),
        ({"modules_to_save": ["lm_head"]}, 14),
        ({"use_dora": True}, 14),
        ({"use_rslora": True}, 14),
        ({"lora_bias": True}, 14),
        ({"bias": "all"}, 14),
        ({"init_lora_weights": False}, 14),
        ({"init_lora_weights": "gaussian"}, 14),
        ({"init_lora_weights": "orthogonal"}, 14),
        ({"init_lora_weights": "eva"}, 14),
    ],
)
def test_what_is_trained_loads_by_every_loader(base, model, tmp_path, fields, layers):
    adapted = randomized(peft.get_peft_model(model, config(**fields))).eval()
    assert len(adapted_layers(adapted)) == layers
    expected = adapted(TOKENS).logits
    assert not torch.equal(expected, base(TOKENS).logits)
    adapted.save_pretrained(tmp_path)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(by_peft(TOKENS).logits, expected)
    by_transformers = copy.deepcopy(base)
    by_transformers.load_adapter(tmp_path)
    assert torch.equal(by_transformers.eval()(TOKENS).logits, expected)


def test_a_compressed_folder_with_an_adapter_opens_by_the_name_of_either(base, tmp_path):
    from transformers import AutoModelForCausalLM

    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = randomized(peft.get_peft_model(loaded, config())).eval()
    expected = adapted(TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(auto(TOKENS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(TOKENS).logits, expected)
    with pytest.raises(ConversionError, match="adapters"):
        adapted.get_base_model().save_pretrained(tmp_path / "neither")


def test_transformers_adds_switches_and_saves_adapters_itself(base, model, tmp_path):
    model.add_adapter(config(), "one")
    expected = randomized(model)(TOKENS).logits
    model.disable_adapters()
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = copy.deepcopy(base)
    again.load_adapter(tmp_path, "other")
    assert torch.equal(again(TOKENS).logits, expected)


def test_several_adapters_stand_side_by_side(base, model):
    expected = {"__base__": base(TOKENS).logits}
    adapted = peft.get_peft_model(model, config())
    adapted.add_adapter("narrow", config(r=2))
    assert len(adapted_layers(adapted)) == 14
    randomized(adapted).eval()
    for name in ("default", "narrow"):
        adapted.set_adapter(name)
        expected[name] = adapted(TOKENS).logits
    with adapted.disable_adapter():
        assert torch.equal(adapted(TOKENS).logits, expected["__base__"])
    mixed = adapted(TOKENS.repeat(3, 1), adapter_names=list(expected)).logits
    for row, one in zip(mixed, expected.values(), strict=True):
        assert error_of(row[None], one) < 1e-5  # sums of a larger batch
    assert torch.equal(adapted.unload()(TOKENS).logits, expected["__base__"])
    injected = peft.inject_adapter_in_model(config(), copy.deepcopy(base))
    assert len(adapted_layers(injected)) == 14


def test_gradient_checkpointing_changes_no_gradient(base):
    gradients = []
    for checkpointing in (False, True):
        adapted = randomized(peft.get_peft_model(copy.deepcopy(base), config(target_modules=SOME))).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        adapted(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_training_lowers_the_loss(model):
    adapted = add_lora(model, config(task_type=None))
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(TOKENS, labels=TOKENS).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_merging_is_refused_before_anything_is_merged(model):
    adapted = randomized(peft.get_peft_model(model, config(target_modules=["lm_head", "up_proj"]))).eval()
    expected, head = adapted(TOKENS).logits, adapted.base_model.model.lm_head
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, adapted_layer(adapted).merge):
        with pytest.raises(ConversionError, match="merged into factored layers"):
            merge()
    assert adapted.base_model.model.lm_head is head and not head.merged
    assert torch.equal(adapted(TOKENS).logits, expected)


def adapted_layer(model):
    return model.get_submodule(adapted_layers(model)[0])


REFUSED = [
    *(
        ({"init_lora_weights": name}, "init_lora_weights")
        for name in ("pissa", "pissa_niter_4", "olora", "corda")
    ),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
    ({"modules_to_save": ["up_proj"]}, "modules_to_save"),
    ({"modules_to_save": ["mlp"]}, "modules_to_save"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_needs_the_dense_weight_is_refused_before_the_model_changes(model, fields, message):
    before = list(model.modules())
    with pytest.raises(ConversionError, match=message):
        peft.get_peft_model(model, config(**fields))
    assert list(model.modules()) == before
    if "init_lora_weights" in fields:  # a dense layer may have it
        peft.get_peft_model(model, config(target_modules=["lm_head"], init_lora_weights="olora"))


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "LoKr", "AdaLora", "OFT", "BOFT", "HRA", "FourierFT"])
def test_other_kinds_of_adapters_are_refused_on_factored_layers(model, kind):
    before = list(model.modules())
    fields = {"total_step": 10} if kind == "AdaLora" else {}
    fields |= {"feedforward_modules": ["q_proj"]} if kind == "IA3" else {}
    with pytest.raises(ConversionError, match="adapters of kind"):
        peft.get_peft_model(model, getattr(peft, f"{kind}Config")(target_modules=["q_proj"], **fields))
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    "other",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1]),
    ],
    ids=lambda one: one.peft_type.value,
)
def test_adapters_of_what_is_dense_work(model, other):
    adapted = peft.get_peft_model(model, other)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def test_on_conv1d_adapters_lie_as_on_the_dense_layer():
    from transformers.pytorch_utils import Conv1D

    model = random_factored_model("gpt2").requires_grad_(False)
    layer = model.transformer.h[0].attn.c_attn
    adapted = randomized(peft.get_peft_model(model, config(target_modules=["c_attn"], fan_in_fan_out=True)))
    dense = Conv1D(layer.out_features, layer.in_features).requires_grad_(False)
    dense.weight.copy_(layer.factors.dense().T)
    dense.bias.copy_(layer.bias)
    beside = nn.ModuleDict({"c_attn": dense})
    other = randomized(
        peft.inject_adapter_in_model(config(target_modules=["c_attn"], fan_in_fan_out=True), beside)
    )
    one = adapted.base_model.model.transformer.h[0].attn.c_attn
    for target in (one, other["c_attn"]):
        for part in (target.lora_A, target.lora_B):
            part["default"].weight.data.fill_(0.01)
    x = torch.randn(3, layer.in_features)
    assert error_of(one(x), other["c_attn"](x)) < 1e-5
