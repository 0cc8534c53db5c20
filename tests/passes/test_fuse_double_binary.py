import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import float_dtypes, random_factors, seeds, sizes

from dbf_compile.passes.fuse_double_binary import fuse_double_binary

SIGN_MATMUL = torch.ops.dbf.sign_matmul.default


def layer(K=37, R=24, N=5, seed=0, dtype=torch.float64, bias=True, result=None, dynamic=(), **settings):
    """Return a graph of one factored layer: the graph, its input, both products."""
    hand = HandGraph()
    x = hand.input(torch.randn(3, K, generator=torch.Generator().manual_seed(seed)).to(dtype), dynamic)
    factors = random_factors(K, R, N, seed=seed)
    node = {name: hand.constant(tensor) for name, tensor in factors.tensors().items()}
    shift = hand.constant(torch.randn(N, dtype=dtype)) if bias else None
    h = hand.call(SIGN_MATMUL, x, node["signs_in"], node["scale_in"], **settings)
    y = hand.call(
        SIGN_MATMUL, h, node["signs_out"], node["scale_mid"], node["scale_out"], shift, result, **settings
    )
    return hand, x, h, y


def fused(hand):
    return sum(name.startswith("double_binary_linear") for name in targets(hand.graph))


@given(K=sizes, R=sizes, N=sizes, seed=seeds, dtype=float_dtypes, bias=st.booleans(), fast=st.booleans())
def test_two_products_become_one_call_of_equal_value(K, R, N, seed, dtype, bias, fast):
    hand, _, _, y = layer(K, R, N, seed, dtype, bias, dtype, fast=fast)
    hand.output(hand.call(torch.neg, y))
    (before,) = hand.run()
    assert fuse_double_binary(hand.graph) == 1
    assert targets(hand.graph) == ["double_binary_linear.default", "neg"]
    (after,) = hand.run()
    assert after.dtype == dtype
    assert torch.equal(after, before)
    assert fuse_double_binary(hand.graph) == 0


def test_batch_stays_symbolic_and_metadata_is_right():
    hand, x, _, y = layer(dynamic=(0,))
    value, trace = y.meta["example_value"], object()
    y.meta["stack_trace"] = trace
    hand.output(hand.call(torch.neg, y))
    fuse_double_binary(hand.graph)
    (call,) = (node for node in hand.graph.nodes if "double_binary" in str(node.target))
    assert call.meta["example_value"] is value and call.meta["stack_trace"] is trace
    assert (
        value.shape[0] is x.meta["example_value"].shape[0]
        or value.shape[0] == x.meta["example_value"].shape[0]
    )


def test_not_where_others_read_the_first_product():
    hand, _, h, y = layer()
    hand.output(hand.call(torch.neg, y), hand.call(torch.neg, h))
    assert fuse_double_binary(hand.graph) == 0


def test_not_for_products_of_two_accuracies():
    hand = HandGraph()
    factors = random_factors(37, 24, 5)
    x = hand.input(torch.randn(3, 37))
    node = {name: hand.constant(tensor) for name, tensor in factors.tensors().items()}
    h = hand.call(SIGN_MATMUL, x, node["signs_in"], node["scale_in"], fast=True)
    y = hand.call(SIGN_MATMUL, h, node["signs_out"], node["scale_mid"], node["scale_out"])
    hand.output(hand.call(torch.neg, y))
    assert fuse_double_binary(hand.graph) == 0


@pytest.mark.parametrize("missing", ["scale_in", "scale_mid", "scale_out"])
def test_not_without_a_scale(missing):
    hand = HandGraph()
    factors = random_factors(37, 24, 5)
    x = hand.input(torch.randn(3, 37))
    node = {name: hand.constant(tensor) for name, tensor in factors.tensors().items()} | {missing: None}
    h = hand.call(SIGN_MATMUL, x, node["signs_in"], node["scale_in"])
    y = hand.call(SIGN_MATMUL, h, node["signs_out"], node["scale_mid"], node["scale_out"])
    hand.output(hand.call(torch.neg, y))
    assert fuse_double_binary(hand.graph) == 0


def test_not_where_the_middle_is_rounded():
    hand = HandGraph()
    factors = random_factors(37, 24, 5)
    x = hand.input(torch.randn(3, 37))
    node = {name: hand.constant(tensor) for name, tensor in factors.tensors().items()}
    h = hand.call(SIGN_MATMUL, x, node["signs_in"], node["scale_in"], None, None, torch.bfloat16)
    y = hand.call(SIGN_MATMUL, h, node["signs_out"], node["scale_mid"], node["scale_out"])
    hand.output(hand.call(torch.neg, y))
    assert fuse_double_binary(hand.graph) == 0


def test_not_where_the_input_changes_in_between():
    hand = HandGraph()
    factors = random_factors(37, 24, 5)
    x = hand.input(torch.randn(3, 37))
    node = {name: hand.constant(tensor) for name, tensor in factors.tensors().items()}
    h = hand.call(SIGN_MATMUL, x, node["signs_in"], node["scale_in"])
    hand.call("add_", x, 1.0)
    y = hand.call(SIGN_MATMUL, h, node["signs_out"], node["scale_mid"], node["scale_out"])
    hand.output(hand.call(torch.neg, y))
    (before,) = hand.run()
    assert fuse_double_binary(hand.graph) == 0
    assert torch.equal(hand.run()[0], before)
