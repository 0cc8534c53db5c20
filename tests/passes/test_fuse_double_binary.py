import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import float_dtypes, random_factors, seeds, sizes

from dbf_compile.passes.fuse_double_binary import fuse_double_binary

SIGN_MATMUL = torch.ops.dbf.sign_matmul.default


def layer(sizes=(37, 24, 5), seed=0, dtype=torch.float64, bias=True, dynamic=(), first=None, second=None):
    """Return a graph of one factored layer, its input and both products.

    Args:
        sizes: K, R and N.
        first, second: arguments of one product, by name, that override others.
    """
    K, R, N = sizes
    hand = HandGraph()
    x = hand.input(torch.randn(3, K, generator=torch.Generator().manual_seed(seed)).to(dtype), dynamic)
    node = {
        name: hand.constant(tensor) for name, tensor in random_factors(K, R, N, seed=seed).tensors().items()
    }
    shift = hand.constant(torch.randn(N, dtype=dtype)) if bias else None
    inner = {"in_scale": node["scale_in"], **(first or {})}
    outer = {"in_scale": node["scale_mid"], "out_scale": node["scale_out"], "bias": shift}
    h = hand.call(SIGN_MATMUL, x, node["signs_in"], **inner)
    y = hand.call(SIGN_MATMUL, h, node["signs_out"], **{**outer, **(second or {})})
    return hand, x, h, y


@given(K=sizes, R=sizes, N=sizes, seed=seeds, dtype=float_dtypes, bias=st.booleans(), fast=st.booleans())
def test_two_products_become_one_call_of_equal_value(K, R, N, seed, dtype, bias, fast):
    second = {"fast": fast, "dtype": dtype}
    hand, _, _, y = layer((K, R, N), seed, dtype, bias, first={"fast": fast}, second=second)
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"fast": True}, {}, id="two accuracies"),
        pytest.param({"in_scale": None}, {}, id="no scale_in"),
        pytest.param({}, {"in_scale": None}, id="no scale_mid"),
        pytest.param({}, {"out_scale": None}, id="no scale_out"),
        pytest.param({"dtype": torch.bfloat16}, {}, id="a rounded middle"),
    ],
)
def test_not_for_other_pairs_of_products(first, second):
    hand, _, _, y = layer(dtype=torch.float32, first=first, second=second)
    hand.output(hand.call(torch.neg, y))
    assert fuse_double_binary(hand.graph) == 0


def test_not_where_the_input_changes_in_between():
    hand, x, h, y = layer()
    with hand.graph.inserting_after(h):
        write = hand.graph.call_method("add_", (x, 1.0))
        write.meta["example_value"] = x.meta["example_value"]
    hand.output(hand.call(torch.neg, y))
    (before,) = hand.run()
    assert fuse_double_binary(hand.graph) == 0
    assert torch.equal(hand.run()[0], before)
