"""Layers that read tables of quantized rows, in the place of dense ones."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from dbf_compile.errors import ConversionError, KernelInputError, WeightError
from dbf_compile.tables import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedRows,
    quantize_tables,
    swap_tables_,
    table_layer,
    table_layers,
)


class Scaled(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(40, 24, padding_idx=0)
        self.register_buffer("factor", torch.tensor(3.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor.to(self.weight.dtype)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(40, 24), nn.Linear(24, 40)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids))


IDS = torch.tensor([[1, 39, 0]])


def of(layer: nn.Module, kind: str = "int8") -> nn.Module:
    return table_layer(layer, QuantizedRows.of(layer.weight, kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layers_compute_what_their_tables_stand_for(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, tokens = nn.Linear(24, 40).to(dtype), Scaled().to(dtype)
    x = torch.randn(2, 24, dtype=dtype)
    new_head, new_tokens = of(head, kind), of(tokens, kind)
    expected = x.double() @ new_head.table.dense(torch.float64).T + head.bias.double()
    y, rows = new_head(x), new_tokens(IDS)
    assert y.dtype == rows.dtype == dtype
    assert (y.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm() + 1e-5
    dense = new_tokens.table.dense(dtype)
    assert torch.equal(rows, dense[IDS] * 3) and isinstance(new_tokens, Scaled)


def test_casts_and_moves_change_no_table() -> None:
    layer = of(nn.Embedding(40, 24))
    rows = layer.rows.clone()
    assert layer.half()(IDS).dtype == torch.float16 and layer.weight.dtype == torch.float16
    assert layer.bfloat16().float().double().weight.dtype == torch.float64
    assert torch.equal(layer.rows, rows) and next(layer.parameters()).dtype == torch.float64
    assert layer.to("meta").rows.is_meta


def test_a_tied_table_is_one() -> None:
    model = Tied()
    dense = copy.deepcopy(model)
    swap_tables_(model, quantize_tables(model, {"tokens": "int8", "head": "int8"}))
    assert model.head.rows is model.tokens.rows and list(table_layers(model)) == ["tokens", "head"]
    assert (model(IDS) - dense(IDS)).norm() < 0.03 * dense(IDS).norm()
    assert sum(parameter.numel() for parameter in model.parameters()) == 40 * 7 + 40  # rows of seven words
    twin = copy.deepcopy(model)
    assert twin.head.rows is twin.tokens.rows and torch.equal(twin(IDS), model(IDS))
    other = swap_tables_(dense, quantize_tables(dense, {"tokens": "int4", "head": "int8"}))
    assert other.tokens.kind == "int4" and other.head.kind == "int8"


def test_a_state_comes_back() -> None:
    torch.manual_seed(0)
    first, second = (
        swap_tables_(m, quantize_tables(m, {"tokens": "int6", "head": "int6"})) for m in (Tied(), Tied())
    )
    assert set(first.state_dict()) == {
        "tokens.weight",
        "tokens.rows",
        "head.weight",
        "head.rows",
        "head.bias",
    }
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(IDS), first(IDS))


@pytest.mark.parametrize("layer", [nn.Embedding(40, 24), Scaled()])
def test_a_layer_can_be_pickled(layer: nn.Module) -> None:
    buffer, new = io.BytesIO(), of(layer)
    torch.save(new, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IDS), new(IDS))


def test_what_a_dense_layer_had_it_has() -> None:
    seen: list[str] = []
    for dense in (nn.Embedding(40, 24, padding_idx=3).eval(), nn.Linear(24, 40).eval()):
        dense.register_forward_hook(lambda *_: seen.append("hook"))
        dense.note = "a note"
        parent = nn.Sequential(dense)
        swap_tables_(parent, quantize_tables(parent, {"0": "int8"}))
        assert parent[0].note == "a note" and not parent[0].training
        parent(IDS if isinstance(dense, nn.Embedding) else torch.ones(24))
    assert seen == ["hook", "hook"] and "padding_idx=3" in repr(of(nn.Embedding(40, 24, padding_idx=3)))


def test_a_weight_shows_what_it_was_and_has_no_values() -> None:
    for layer in (of(nn.Embedding(40, 24)), of(nn.Linear(24, 40))):
        assert layer.weight.shape == (40, 24) and isinstance(layer.weight, nn.Parameter)
        with pytest.raises(ConversionError, match="a quantized table in"):
            _ = layer.weight + 1
        with pytest.raises(ConversionError, match="a quantized table"):
            layer.weight = nn.Parameter(torch.zeros(40, 24))


def test_gradients_reach_the_input_and_the_bias_alone() -> None:
    layer, x = of(nn.Linear(24, 40)), torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.table.dense().sum(0).expand(3, 24), atol=1e-5)
    assert layer.bias.grad is not None and not layer.rows.requires_grad


def test_ids_are_whole_numbers_of_rows() -> None:
    layer = of(nn.Embedding(40, 24))
    assert torch.equal(layer(IDS.int()), layer(IDS))
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))
    with pytest.raises(KernelInputError, match="ids of dtype"):
        layer(torch.tensor([1.0]))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = Tied()
    model.tokens.weight.data[3, 3] = torch.nan
    with pytest.raises(WeightError, match="'tokens': a weight with NaN"):
        quantize_tables(model, {"tokens": "int8"})


def test_autocast_is_followed() -> None:
    head = of(nn.Linear(24, 40))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 24)).dtype == torch.bfloat16
        assert head(torch.randn(2, 24).double()).dtype == torch.float64


def test_one_graph_computes_the_same() -> None:
    model = Tied()
    swap_tables_(model, quantize_tables(model, {"tokens": "int4", "head": "int4"}))
    assert isinstance(model.tokens, QuantizedEmbedding) and isinstance(model.head, QuantizedLinear)
    exported = torch.export.export(model, (IDS,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2)},))
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(exported.module()(ids), model(ids))
