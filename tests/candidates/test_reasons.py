"""Every linear layer that stays dense has a reason, and the user hears of it once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from dbf_compile.candidates.reasons import (
    listed,
    other_matrices,
    reasons_against,
    reasons_to_stay_dense,
    tell_left_dense,
)


class Tied(nn.Module):
    """Layers that share weights with each other, with an embedding, and one that is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.one, self.two, self.head, self.free = (nn.Linear(8, 8) for _ in range(4))
        self.decoder.weight, self.two.weight = self.embedding.weight, self.one.weight
        self.again = self.free

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_tied_layers_and_the_head_stay_dense_unasked() -> None:
    assert reasons_to_stay_dense(Tied()) == {
        "decoder": "that an embedding reads, too",
        "one": "tied to another layer",
        "two": "tied to another layer",
        "head": "the model's head",
    }
    assert "head" not in reasons_to_stay_dense(Tied(), heads=["head"])
    assert reasons_against(Tied()) == {}


class Used(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x) @ self.a.weight


def test_used_and_computed_weights_cannot_be_factored() -> None:
    model = nn.Sequential(Used(), nn.Linear(8, 8))
    model[1].forward = model[1].forward
    assert reasons_against(model) == {
        "0.a": "whose weight is used without a call in Used.forward",
        "1": "with a forward of its own",
    }


def adapted(**changes: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    config = changes.pop("kind", "LoraConfig")
    sizes = {"r": 2} if config in ("LoraConfig", "LoHaConfig", "VeraConfig", "HRAConfig") else {}
    return peft.get_peft_model(model, getattr(peft, config)(target_modules=["up"], **sizes, **changes))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({}, None),
        ({"use_dora": True}, "whose weight DoRA reads"),
        ({"modules_to_save": ["down"]}, None),
        ({"kind": "LoHaConfig"}, None),
        ({"kind": "VeraConfig"}, None),
        ({"kind": "IA3Config", "feedforward_modules": []}, None),
        ({"kind": "HRAConfig"}, "whose weight is used without a call in"),
    ],
    ids=str,
)
def test_adapters_are_never_factored(changes: dict[str, Any], base: str | None) -> None:
    model = adapted(**changes)
    reasons = reasons_against(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layer = next(name for name in linears if name.endswith("up.base_layer"))
    assert (reasons.pop(layer, None) or "").startswith(base or "") and (base is None) == (
        layer not in reasons_against(model)
    )
    plain = {name for name in linears if name.endswith(".down")}
    assert set(reasons) == linears - plain - {layer}
    assert set(reasons.values()) <= {"an adapter of PEFT"}


def test_prompt_encoders_are_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=2, token_dim=8, num_layers=1, num_transformer_submodules=1, encoder_hidden_size=8
    )
    model = nn.Module()
    model.prompt_encoder = peft.PromptEncoder(config)
    assert set(reasons_against(nn.ModuleDict({"m": model})).values()) == {"an adapter of PEFT"}


def test_matrices_outside_of_linear_layers_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.token = nn.Parameter(torch.ones(3, 32, 16)), nn.Parameter(torch.ones(1, 32, 16))

    model = nn.ModuleDict(
        {"rnn": nn.GRU(8, 8), "e": Experts(), "conv": nn.Conv1d(32, 32, 32), "n": nn.Linear(8, 8)}
    )
    assert other_matrices(model) == {
        "rnn.weight_ih_l0": "in GRU",
        "rnn.weight_hh_l0": "in GRU",
        "e.up": "of experts in one tensor; see linearize_experts_",
    }
    assert other_matrices(nn.MultiheadAttention(8, 2)) == {"in_proj_weight": "in MultiheadAttention"}
    for module in (
        nn.LSTM(8, 8, proj_size=4),
        nn.RNN(8, 8),
        nn.GRUCell(8, 8),
        nn.LSTMCell(8, 8),
        nn.RNNCell(8, 8),
    ):
        matrices = [name for name, value in module.named_parameters() if value.dim() == 2]
        assert other_matrices(module) == dict.fromkeys(matrices, f"in {type(module).__name__}")
    assert other_matrices(nn.Bilinear(8, 9, 10)) == {"weight": "in Bilinear"}


def test_layers_are_listed_by_reason() -> None:
    dense = dict.fromkeys("abcd", "small") | {"": "skipped by name"}
    assert listed(dense) == "4 small (a, b, c, …); 1 skipped by name (the model itself)"


def test_less_than_was_asked_for_is_a_warning_once_for_a_model(caplog: pytest.LogCaptureFixture) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    caplog.set_level(logging.INFO, "dbf_compile")
    for each in (model, model, other):
        tell_left_dense(each, 3, {"a": "on the meta device"})
    tell_left_dense(model, 3, {"a": "skipped by name", "b": "too small to gain at 2 bits per weight"})
    tell_left_dense(model, 3, {})
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert caplog.messages[0] == (
        "3 of 4 linear layers of Linear are factored; left dense: 1 on the meta device (a)"
    )
