import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import seeds, sizes

from dbf_compile.passes.graph import example_value
from dbf_compile.passes.replace_linears import replace_linears
from dbf_compile.testing import assert_close


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer(sizes=(3, 5, 7), bias=True, transposed=False, seed=0, dtype=torch.float64, group=None, dynamic=()):
    """Return a graph of one linear layer, its weight and its output; sizes are M, K and N, where M may be several."""
    M, K, N = sizes
    hand = HandGraph(group)
    x = hand.input(
        randn(*((M, K) if isinstance(M, int) else (*M, K)), seed=seed, dtype=dtype), dynamic=dynamic
    )
    stored = hand.constant(randn(*((K, N) if transposed else (N, K)), seed=seed + 1, dtype=dtype))
    w = hand.call("t", stored) if transposed else stored
    b = hand.constant(randn(N, seed=seed + 2, dtype=dtype)) if bias else None
    return hand, stored, hand.call(F.linear, x, w, b)


def must_not_fire(hand):
    before = targets(hand.graph)
    assert replace_linears(hand.graph, hand) == 0
    assert targets(hand.graph) == before


@settings(max_examples=50)
@given(
    M=st.one_of(st.integers(0, 4), st.tuples(st.integers(1, 2), st.integers(1, 3)), st.just(())),
    K=sizes,
    N=sizes,
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=seeds,
)
def test_the_factored_form_computes_what_the_dense_form_of_its_factors_does(M, K, N, bias, transposed, seed):
    hand, _, y = layer((M, K, N), bias, transposed, seed)
    hand.output(hand.call(torch.neg, y))
    original, _, z = layer((M, K, N), bias, transposed, seed)
    original.output(original.call(torch.neg, z))

    assert replace_linears(hand.graph, hand) == 1
    assert "linear" not in targets(hand.graph) and "t" not in targets(hand.graph)
    (after,), (dense,) = hand.run(), hand.run_dense(original)
    # float64 throughout; the factored sums take another order. Sums may cancel, but rows of float16 scales of size 1
    # keep every term below 1e4, so that 1e-9 is far above rounding and far below any wrong sign.
    assert_close(after, dense, bound=1e-9)

    assert replace_linears(hand.graph, hand) == 0


def test_a_stack_is_replaced_as_one():
    hand = HandGraph()
    x, w, v = hand.input(randn(3, 5)), hand.constant(randn(4, 5)), hand.constant(randn(5, 2, seed=1))
    hand.output(hand.call(F.linear, x, hand.call(torch.cat, [w, hand.call("t", v)], 0), None))
    assert replace_linears(hand.graph, hand) == 1
    (weights,) = hand.factored
    assert [(weight.node, weight.transposed) for weight in weights] == [(w, False), (v, True)]
    assert "cat" not in targets(hand.graph)
    assert hand.run()[0].shape == (3, 6)


def test_a_layer_used_twice_is_factored_once():
    hand = HandGraph()
    x, w = hand.input(randn(3, 5)), hand.constant(randn(5, 5))
    hand.output(hand.call(F.linear, hand.call(F.linear, x, w, None), w, None))
    assert replace_linears(hand.graph, hand) == 2
    assert len(hand.factored) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_keeps_its_dtype_and_provenance(dtype):
    hand, _, y = layer(dtype=dtype)
    y.meta["nn_module_stack"] = {"layer": ("layer", torch.nn.Linear)}
    user = hand.call(torch.neg, y)
    hand.output(user)
    assert replace_linears(hand.graph, hand) == 1
    (output,) = user.all_input_nodes
    assert example_value(output).dtype == dtype
    assert hand.run()[0].dtype == dtype
    added = [node for node in hand.graph.nodes if node.op.startswith("call") and node is not user]
    assert all(node.meta["nn_module_stack"] == {"layer": ("layer", torch.nn.Linear)} for node in added)
    assert all("example_value" in node.meta for node in added)


def test_under_autocast_the_output_has_the_lower_dtype():
    hand, _, y = layer(dtype=torch.float32)
    y.meta["example_value"] = example_value(y).to(torch.bfloat16)
    user = hand.call(torch.neg, y)
    hand.output(user)
    assert replace_linears(hand.graph, hand) == 1
    assert example_value(user.all_input_nodes[0]).dtype == torch.bfloat16


def test_batch_and_sequence_length_stay_symbolic():
    hand, _, y = layer(((2, 3), 5, 7), dynamic=(0, 1))
    user = hand.call(torch.neg, y)
    hand.output(user)
    assert replace_linears(hand.graph, hand) == 1
    batch, length, features = example_value(user.all_input_nodes[0]).shape
    assert isinstance(batch, torch.SymInt) and isinstance(length, torch.SymInt) and features == 7
    assert not hand._fake_mode.shape_env.guards


def test_not_where_the_source_wants_it_dense():
    hand, _, y = layer(group=lambda weight: None)
    hand.output(y)
    must_not_fire(hand)


def test_not_for_a_stack_of_layers_that_do_not_belong_together():
    hand = HandGraph(group=lambda weight: weight.node.name)
    x, w, v = hand.input(randn(3, 5)), hand.constant(randn(4, 5)), hand.constant(randn(2, 5))
    hand.output(hand.call(F.linear, x, hand.call(torch.cat, [w, v], 0), None))
    must_not_fire(hand)


@pytest.mark.parametrize("through_view", [False, True])
def test_not_for_a_weight_that_is_written_to(through_view):
    hand, stored, y = layer()
    hand.call("add_", hand.call("view", stored, -1) if through_view else stored, 1.0)
    hand.output(y)
    must_not_fire(hand)


def test_not_for_a_weight_that_others_need_dense():
    hand, stored, y = layer()
    hand.output(y, hand.call("sum", stored))
    must_not_fire(hand)


def test_not_for_computed_weights():
    hand = HandGraph()
    x, w = hand.input(randn(3, 5)), hand.constant(randn(7, 5))
    hand.output(hand.call(F.linear, x, hand.call(torch.tanh, w), None))
    must_not_fire(hand)


def test_not_for_complex_layers():
    hand, _, y = layer(dtype=torch.complex64)
    hand.output(y)
    must_not_fire(hand)
