"""Operations of a token: against a count of the layers that a token really calls."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from support.models.tiny import tiny_gpt2, tiny_llama
from torch import nn

from dbf_compile.compression.layers import convert_
from dbf_compile.compression.operations import (
    Operations,
    count_operations,
    dense_operations,
    factored_operations,
    shared_first_stages,
)
from dbf_compile.linear import DoubleBinaryLinear, is_conv1d
from dbf_compile.tables import QuantizedRows, swap_tables_

transformers = pytest.importorskip("transformers")

FAST = {"bits_per_weight": 2.0, "iterations": 1}


def called_layers(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers that a model calls for one token, each as often as it does."""
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, DoubleBinaryLinear)) or is_conv1d(module):
            module.register_forward_hook(lambda module, *_: called.append(module))
    model(torch.tensor([[1]]))
    return called


def cost_when_dense(layer: nn.Module) -> Operations:
    if is_conv1d(layer):
        return dense_operations(*layer.weight.shape)
    return dense_operations(layer.in_features, layer.out_features)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_dense_model_costs_what_it_calls(make) -> None:
    model = make()
    counts = count_operations(model)
    assert counts.total == counts.dense == counts.dense_model
    assert counts.dense == sum(map(cost_when_dense, called_layers(model)), Operations())
    assert counts.factored == Operations() and not counts.experts and not counts.uncounted


def test_a_first_stage_that_layers_share_is_counted_once() -> None:
    model = convert_(tiny_llama(layers=1), **FAST)
    counts, layers = count_operations(model), called_layers(model)
    separate, seen = Operations(), set()
    for layer in layers:
        if isinstance(layer, DoubleBinaryLinear):
            sizes = (layer.in_features, layer.mid_features)
            if id(layer.signs_in) in seen:  # one more row of a stage that is there, for each of its rows
                first, second = factored_operations(*sizes, 1), factored_operations(*sizes, 2)
                row = {name: asdict(second)[name] - asdict(first)[name] for name in asdict(first)}
                cost = Operations(**{name: layer.out_features * count for name, count in row.items()})
            else:
                cost = factored_operations(*sizes, layer.out_features)
            seen.add(id(layer.signs_in))
            separate += cost
    assert len(seen) < sum(isinstance(layer, DoubleBinaryLinear) for layer in layers)
    assert counts.factored == separate
    assert counts.dense_model == sum(map(cost_when_dense, layers), Operations())
    assert [len(group) for _, group in shared_first_stages(model)] == [
        3,
        1,
        2,
        1,
    ]  # q, k, v; o; gate, up; down
    assert counts.factored.multiplications < 0.1 * counts.dense_model.multiplications


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_a_token_reaches_some_experts(kind: str, linear: bool) -> None:
    from dbf_compile.integrations.experts import linearize_experts_

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **{"num_local_experts" if kind != "Qwen3Moe" else "num_experts": 6},
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if linear:
        linearize_experts_(model)
    counts = count_operations(model)
    assert counts.experts == ("2 of 6",)
    attention = [dense_operations(16, 16), dense_operations(16, 8), dense_operations(16, 8)]
    router, head = dense_operations(16, 6), dense_operations(16, 40)
    expert = dense_operations(16, 48) + dense_operations(24, 16)
    assert counts.total == sum(
        [*attention, dense_operations(16, 16), router, head, expert, expert], Operations()
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tables_of_quantized_rows_are_counted_as_such(kind: str) -> None:
    model = tiny_llama(layers=1)
    dense = count_operations(model)
    head, embedding = model.lm_head, model.model.embed_tokens
    names = {"lm_head": head.weight, "model.embed_tokens": embedding.weight}
    swap_tables_(model, {name: QuantizedRows.of(weight.detach(), kind) for name, weight in names.items()})
    counts = count_operations(model)
    columns, rows = head.in_features, head.out_features
    groups = 1 if kind == "int8" else -(-columns // 32)
    assert counts.dense_model == dense.dense_model and not counts.uncounted
    assert counts.quantized.multiplications == rows * (columns + groups) + columns
    assert counts.quantized.additions == counts.quantized.lookup_additions == rows * (columns - 1)
    assert counts.dense + dense_operations(columns, rows) == dense.dense


def test_of_experts_that_no_one_chooses_all_are_counted() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(5))
    counts = count_operations(model)
    assert counts.total == sum([dense_operations(4, 3)] * 5, Operations())
    assert counts.experts == ("all of 5, as it is not known how many",)


def test_matrices_of_other_modules_are_named_as_not_counted() -> None:
    counts = count_operations(nn.Sequential(nn.Conv1d(3, 4, 5), nn.Linear(4, 3), nn.Embedding(7, 2)))
    assert counts.uncounted == 60 and counts.total == dense_operations(4, 3)
