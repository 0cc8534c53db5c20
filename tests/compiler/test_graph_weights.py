"""One weight and several uses: what compiled code computes is near the dense model, or is the dense model."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compiled import compiled
from support.models.tiny import error_of, randn
from torch import nn

from dbf_compile.compiler.graph_weights import is_plain

# 16 bits per weight leave an error of about 1e-3 a layer; a wrong weight one of about 1.
NEAR = 0.05
EIGHT_BITS = {"bits_per_weight": 16.0, "iterations": 30}


class Uses(nn.Module):
    """Weights that a list of uses reads, one after the other."""

    def __init__(self, uses):
        super().__init__()
        torch.manual_seed(0)
        self.uses = uses
        self.square, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.tied, self.up, self.embedding = (
            nn.Linear(64, 64),
            nn.Linear(64, 96, bias=False),
            nn.Embedding(64, 64),
        )
        self.tied.weight = self.square.weight
        self.requires_grad_(False)

    def forward(self, x):
        for use in self.uses:
            x = F.layer_norm(x + USES[use](self, x), (64,))
        return x


USES = {
    "as it is": lambda m, x: m.square(x),
    "without its bias": lambda m, x: F.linear(x, m.square.weight),
    "transposed": lambda m, x: F.linear(x, m.square.weight.t()),
    "by a product": lambda m, x: x @ m.square.weight,
    "tied": lambda m, x: m.tied(x),
    "another with it": lambda m, x: m.square(x) + m.other(x),
    "not square, there and back": lambda m, x: F.linear(m.up(x), m.up.weight.t()),
    "in a loop": lambda m, x: m.other(torch.relu(m.other(x))),
    "in slices": lambda m, x: torch.cat([F.linear(x, part) for part in m.other.weight.chunk(2)], -1),
    "a row": lambda m, x: m.other(x) + m.other.weight[3],
    "as another dtype": lambda m, x: F.linear(x.double(), m.other.weight.double()).float(),
    "of an embedding": lambda m, x: F.linear(x, m.embedding.weight) + m.embedding(x.argmax(-1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_each_use_of_a_weight(use):
    model, x = Uses([use]), randn(5, 64)
    assert error_of(compiled(model, **EIGHT_BITS)(x), model(x)) < NEAR


@pytest.mark.slow
@settings(max_examples=6)
@given(st.lists(st.sampled_from(sorted(USES)), min_size=2, max_size=4))
def test_any_uses_of_a_weight_in_one_graph(uses):
    torch.compiler.reset()
    model, x = Uses(uses), randn(5, 64)
    assert error_of(compiled(model, **EIGHT_BITS)(x), model(x)) < NEAR * len(uses)


def test_one_weight_in_two_graphs():
    class Broken(Uses):
        def forward(self, x):
            x = F.layer_norm(self.square(x), (64,))
            torch._dynamo.graph_break()
            return F.linear(x, self.square.weight.t())

    model, x = Broken([]), randn(5, 64)
    options = EIGHT_BITS | {"progress": False}
    assert error_of(torch.compile(model, backend="dbf", options=options)(x), model(x)) < NEAR


def test_a_weight_measured_for_one_use_is_not_factored_for_another():
    import dbf_compile

    model, x = Uses(["not square, there and back"]), randn(5, 64)
    importance = {"up": dbf_compile.Importance(torch.logspace(-3, 3, 64))}
    assert torch.allclose(compiled(model, importance=importance)(x), model(x), atol=1e-5)


def test_plain_tensors_have_data_of_their_own():
    weight = nn.Parameter(torch.ones(3, 3))
    assert is_plain(weight) and is_plain(weight.detach())
    others = (weight.to("meta"), weight.detach().to_sparse(), torch.nn.UninitializedParameter(), 3, None)
    assert not any(is_plain(value) for value in others)
