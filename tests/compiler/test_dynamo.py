"""The graphs that Dynamo captures: names, static inputs, copies that may be rewritten, and inputs that are added."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from dbf_compile.compiler import dynamo


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x + self.shift,))


def captured(change: Any) -> tuple[GraphModule, list[Any], torch.Tensor]:
    """Compile a model with a backend that returns ``change(graph, inputs)``; return graph, inputs and result."""
    graphs: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, inputs))
        return change(gm, inputs)

    torch.manual_seed(0)
    y = torch.compile(Model().requires_grad_(False), backend=backend, fullgraph=True)(torch.ones(3, 4))
    ((gm, inputs),) = graphs
    return gm, inputs, y


def placeholders(gm: GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


def test_parameters_and_buffers_are_static_and_named_as_in_the_model() -> None:
    gm, _, _ = captured(lambda gm, inputs: gm.forward)
    static = {dynamo.qualified_name(node) for node in placeholders(gm) if dynamo.is_static_input(node)}
    assert static == {"blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "shift"}
    assert sum(not dynamo.is_static_input(node) for node in placeholders(gm)) == 1


def test_a_copy_computes_the_same_and_leaves_the_graph_as_it_was() -> None:
    def change(gm: GraphModule, inputs: list[Any]) -> Any:
        before = str(gm.graph)
        twin = dynamo.copy_graph(gm)
        names = [dynamo.qualified_name(node) for node in placeholders(gm)]
        assert [dynamo.qualified_name(node) for node in placeholders(twin)] == names
        for node in twin.graph.find_nodes(op="call_function", target=torch.relu):
            node.target = torch.sigmoid
        twin.recompile()
        assert str(gm.graph) == before
        return twin.forward

    _, _, y = captured(change)
    _, _, expected = captured(lambda gm, inputs: gm.forward)
    assert not torch.equal(y, expected)  # the copy was changed, and was what ran
    _, _, same = captured(lambda gm, inputs: dynamo.copy_graph(gm).forward)
    assert torch.equal(same, expected)


def test_an_added_input_is_static_and_fake_on_both_sides() -> None:
    def change(gm: GraphModule, inputs: list[Any]) -> Any:
        twin = dynamo.copy_graph(gm)
        node, fake = dynamo.add_static_input(twin.graph, "extra", torch.ones(5, 3).T)
        assert placeholders(twin)[-1] is node
        assert dynamo.is_static_input(node)
        for value in (fake, node.meta["example_value"]):
            assert not dynamo.is_real(value)
            assert (value.shape, value.stride()) == ((3, 5), (1, 3))
        twin.recompile()
        return lambda *inputs: twin.forward(*inputs, torch.zeros(3, 5))

    captured(change)


@pytest.mark.parametrize("value", [None, 3, torch.empty(2, device="meta")])
def test_what_has_no_data_is_not_real(value: Any) -> None:
    assert not dynamo.is_real(value)
    assert dynamo.is_real(copy.deepcopy(nn.Parameter(torch.ones(2))))
    with FakeTensorMode():
        assert not dynamo.is_real(torch.ones(2))
