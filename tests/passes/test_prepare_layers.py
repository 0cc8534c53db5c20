"""Layers of one input become one call; what reads other tensors, or writes to the input, stays."""

import torch
from support.graphs import HandGraph, targets
from support.strategies import random_factors

from dbf_compile.ops import prepare_layers as prepared_of
from dbf_compile.passes.prepare_layers import prepare_layers

SIGN_MATMUL = torch.ops.dbf.sign_matmul.default
CALL = torch.ops.dbf.prepared_layers.default


def graph_of(rows=(5, 40), bias=False, write=False):
    """Return a graph of layers of one input."""
    hand = HandGraph()
    x = hand.input(torch.randn(3, 37, generator=torch.Generator().manual_seed(0)))
    outputs = []
    for seed, count in enumerate(rows):
        own = random_factors(37, 24, count, seed=seed).tensors()
        node = {name: hand.constant(tensor) for name, tensor in own.items()}
        shift = hand.constant(torch.randn(count)) if bias else None
        h = hand.call(SIGN_MATMUL, x, node["signs_in"], in_scale=node["scale_in"])
        scales = {"in_scale": node["scale_mid"], "out_scale": node["scale_out"], "bias": shift}
        outputs.append(hand.call(torch.neg, hand.call(SIGN_MATMUL, h, node["signs_out"], **scales)))
    if write:
        hand.call(torch.Tensor.zero_, x)
    hand.output(*outputs)
    return hand


def rewrite(hand):
    def add_input(name, tensor):
        return hand.constant(torch.zeros(tensor.shape, dtype=tensor.dtype))

    prepared = prepare_layers(hand.graph, add_input)
    for item in prepared:
        values = [[hand.inputs[node] for node in nodes] for nodes in (item.factors, item.biases)]
        hand.inputs[item.node] = prepared_of(*values, interleaved=item.interleaved)
    return prepared


def test_layers_of_one_input_become_one_call_of_equal_bits():
    for bias in (False, True):
        hand = graph_of(bias=bias)
        before = hand.run()
        (item,) = rewrite(hand)
        assert len(item.factors) == 10 and len(item.biases) == 2 * bias
        assert sum(node.target == CALL for node in hand.graph.nodes) == 1
        assert "sign_matmul.default" not in targets(hand.graph)
        for after, exact in zip(hand.run(), before, strict=True):
            assert torch.equal(after, exact)
        assert rewrite(hand) == []


def test_a_layer_alone_needs_no_parts():
    hand = graph_of(rows=(7,))
    (before,) = hand.run()
    rewrite(hand)
    assert targets(hand.graph) == ["prepared_layers.default", "neg"]
    assert torch.equal(hand.run()[0], before)


def test_an_input_that_is_written_to_stays():
    assert rewrite(graph_of(write=True)) == []
