"""What a compilation leaves dense is said once, with counts and reasons; a model that is factored as asked is silent."""

import logging

import pytest
import torch
import torch.nn.functional as F
from support.compiled import Block, compiled
from support.models.tiny import MLP, OPTIONS, factored, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import dbf_compile
from dbf_compile.compiler import inductor


@pytest.fixture(autouse=True)
def graphs_run_as_they_are(monkeypatch):
    """Leave out Inductor: all is said before it compiles, and test_backend.py compares what it makes of such models."""
    monkeypatch.setattr(inductor, "compile_graph", lambda graph, *_: graph)


class Applied(nn.Module):
    """A function of two layers and an input."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.one, self.two = function, nn.Linear(64, 64), nn.Linear(64, 64)
        self.requires_grad_(False)

    def forward(self, x):
        return self.function(self, x)


def heard(caplog, run, *args, level=logging.WARNING, **kwargs):
    with caplog.at_level(logging.INFO, logger="dbf_compile"), torch.no_grad():
        run(*args, **kwargs)
    return [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("dbf: ") and record.levelno >= level
    ]


def written(model, x):
    model.two.weight.mul_(1.0)
    return model.two(model.one(x))


REASONS = {
    "in a subgraph": lambda m, x: m.one(checkpoint(m.two, x, use_reentrant=False)),
    "in a subgraph (cond": lambda m, x: m.one(torch.cond(x.sum() > 0, m.two, lambda x: m.two(x) * 2, (x,))),
    "with a weight that the graph writes to": written,
    "with a weight computed by getitem": lambda m, x: m.one(F.linear(x, m.two.weight[:32]).repeat(1, 2)),
    "with a weight computed by abs": lambda m, x: m.one(F.linear(x, m.two.weight.float().abs())),
    "add reads it, too": lambda m, x: m.one(m.two(x) + m.two.weight.add(1).sum()),
    "with a weight that is an argument": lambda m, x: (
        m.one(F.linear(x, x)) if len(x) == 64 else m.one(F.linear(x, x)[:, :1] * x)
    ),
    "in einsum": lambda m, x: m.one(torch.einsum("nk,mk->nm", x, m.two.weight)),
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", REASONS)
def test_what_is_left_dense_is_said_with_its_reason(reason, caplog):
    (message,) = heard(caplog, compiled(Applied(REASONS[reason])), randn(5, 64))
    assert message.startswith("dbf: 1 of 2 linear layers of Applied are factored; left dense: 1 ")
    assert reason in message


def test_modules_that_compute_with_weights_in_a_form_of_their_own_are_named(caplog):
    attention, x = nn.MultiheadAttention(64, 4).requires_grad_(False), randn(5, 2, 64)
    (message,) = heard(caplog, torch.compile(attention, backend="dbf", options=OPTIONS), x, x, x)
    assert (
        "multi_head_attention_forward" in message and "0 of 2 linear layers of MultiheadAttention" in message
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gru, self.last = nn.Linear(64, 64), nn.GRU(64, 64), nn.Linear(64, 64)
        self.requires_grad_(False)

    def forward(self, x):
        return self.last(self.gru(self.first(x))[0])


@pytest.mark.slow
def test_recurrent_layers_between_graphs_are_named_once(caplog):
    model = Recurrent()
    run = torch.compile(model, backend="dbf", options=OPTIONS)
    (message,) = heard(caplog, run, randn(5, 2, 64))
    assert message.endswith("2 in GRU (gru.weight_ih_l0, gru.weight_hh_l0)")
    caplog.clear()
    alone = torch.compile(nn.LSTM(64, 64, 2).requires_grad_(False), backend="dbf", options=OPTIONS)
    for _ in range(2):
        (message,) = heard(caplog, alone, randn(5, 2, 64))
        assert "4 in LSTM (weight_ih_l0, weight_hh_l0, weight_ih_l1, …)" in message
    caplog.clear()
    dbf_compile.convert_(model, **OPTIONS)
    assert "2 of 4 linear layers of Recurrent are factored; left dense: 2 in GRU" in caplog.text


def test_weights_on_meta_are_named(caplog):
    (message,) = heard(caplog, compiled(MLP().to("meta")), randn(5, 67).to("meta"))
    assert "0 of 2" in message and "2 on the meta device (up, down)" in message


def test_too_few_bits_for_any_layer(caplog):
    (message,) = heard(caplog, compiled(MLP(), bits_per_weight=0.1), randn(5, 67))
    assert "0 of 2" in message and "too small to gain at 0.1 bits per weight (up, down)" in message


def test_a_model_without_linear_layers_is_told_once(caplog):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()).requires_grad_(False)
    run = torch.compile(model, backend="dbf")
    for length in (5, 6, 7):
        messages = heard(caplog, run, randn(2, 3, length))
    assert messages == ["dbf: no linear layer to factor in Sequential"]


def test_recompilations_and_blocks_say_it_once(caplog):
    blocks = nn.Sequential(*(Applied(written) for _ in range(3)))
    for block in blocks:
        block.compile(backend="dbf", options=OPTIONS)
    for batch in (4, 5, 6):
        messages = heard(caplog, blocks, randn(batch, 64))
    assert len(messages) == 1


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(1), nn.Linear(70, 2)
        self.requires_grad_(False)

    def forward(self, x):
        x = torch.relu(x)
        torch._dynamo.graph_break()
        x = self.block(x)
        torch._dynamo.graph_break()
        return self.head(torch.sin(x))


SILENT = {
    "all factored": lambda: MLP(),
    "converted": lambda: factored(MLP()),
    "graph breaks, and a head that is too small": Broken,
    "no module": lambda: torch.relu,
    "tied to an embedding": lambda: Tied(),
}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.up = nn.Embedding(67, 67), nn.Linear(67, 67)
        self.requires_grad_(False)

    def forward(self, x):
        return F.linear(self.up(x), self.embedding.weight) + self.embedding(x.argmax(-1))


@pytest.mark.parametrize("kind", SILENT)
def test_what_is_as_asked_is_silent(kind, caplog):
    run = torch.compile(SILENT[kind](), backend="dbf", options=OPTIONS)
    assert heard(caplog, run, randn(5, 70 if "breaks" in kind else 67)) == []


def test_layers_that_the_user_skips_are_counted_quietly(caplog):
    messages = heard(caplog, compiled(MLP(), skip=["up"]), randn(5, 67), level=logging.INFO)
    assert messages == ["dbf: 1 of 2 linear layers of MLP are factored; left dense: 1 skipped by name (up)"]
    assert heard(caplog, compiled(MLP(), skip=["up"]), randn(5, 67)) == []


def test_converted_layers_within_subgraphs_are_no_dense_ones(caplog):
    model = dbf_compile.convert_(Applied(REASONS["in a subgraph"]), **OPTIONS)
    assert heard(caplog, compiled(model), randn(5, 64)) == []


@torch.inference_mode()
def test_weights_that_count_no_versions_are_said(caplog):
    (message,) = heard(caplog, compiled(MLP()), randn(5, 67))
    assert "a later write to few of their entries is not noticed" in message
