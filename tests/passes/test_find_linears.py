import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import seeds, sizes

from dbf_compile.compiler import dynamo
from dbf_compile.passes.find_linears import find_linears
from dbf_compile.passes.graph import example_value, is_linear, weights_of
from dbf_compile.testing import assert_close

aten = torch.ops.aten


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_nodes(hand):
    return [node for node in hand.graph.nodes if is_linear(node) and weights_of(node.args[1], hand)]


# spelling -> (build the node from x, the stored weight and the bias, stored as [K, N], takes a bias, needs 2-D x)
SPELLINGS = {
    "linear": (lambda h, x, w, b: h.call(F.linear, x, w, b), False, True, False),
    "linear by keyword": (lambda h, x, w, b: h.call(F.linear, x, w, bias=b), False, True, False),
    "linear of w.T": (lambda h, x, w, b: h.call(F.linear, x, h.call(getattr, w, "T"), b), True, True, False),
    "aten.linear": (lambda h, x, w, b: h.call(aten.linear.default, x, w, b), False, True, False),
    "Conv1D": (lambda h, x, w, b: h.call(torch.addmm, b, x, w), True, True, True),
    "addmm of w.t()": (lambda h, x, w, b: h.call(torch.addmm, b, x, h.call("t", w)), False, True, True),
    "aten.addmm": (lambda h, x, w, b: h.call(aten.addmm.default, b, x, w), True, True, True),
    "addmm by keyword": (lambda h, x, w, b: h.call(torch.addmm, b, x, w, beta=1, alpha=1), True, True, True),
    "mm": (lambda h, x, w, b: h.call(torch.mm, x, w), True, False, True),
    "mm of w.t()": (lambda h, x, w, b: h.call(torch.mm, x, h.call("t", w)), False, False, True),
    "method mm": (lambda h, x, w, b: h.call("mm", x, w), True, False, True),
    "aten.mm": (lambda h, x, w, b: h.call(aten.mm.default, x, w), True, False, True),
    "matmul": (lambda h, x, w, b: h.call(torch.matmul, x, w), True, False, False),
    "x @ w": (lambda h, x, w, b: h.call(operator.matmul, x, w), True, False, False),
    "method matmul": (lambda h, x, w, b: h.call("matmul", x, w), True, False, False),
    "x @ w.transpose(0, 1)": (
        lambda h, x, w, b: h.call(operator.matmul, x, h.call("transpose", w, 0, 1)),
        False,
        False,
        False,
    ),
}


@given(
    spelling=st.sampled_from(sorted(SPELLINGS)),
    M=st.integers(0, 4),
    K=sizes,
    N=sizes,
    dims=st.integers(1, 3),
    seed=seeds,
)
def test_every_spelling_becomes_a_linear_of_equal_value(spelling, M, K, N, dims, seed):
    build, transposed, with_bias, flat = SPELLINGS[spelling]
    hand = HandGraph()
    x = hand.input(randn(*((M, K) if flat else ((2, M, K)[3 - dims :])), seed=seed))
    w = hand.constant(randn(*((K, N) if transposed else (N, K)), seed=seed + 1))
    b = hand.constant(randn(N, seed=seed + 2)) if with_bias else None
    y = build(hand, x, w, b)
    expected_value = example_value(y)
    hand.output(hand.call(torch.neg, y))
    (before,) = hand.run()

    already = is_linear(y)
    assert find_linears(hand.graph, hand) == (0 if already else 1)
    (linear,) = linear_nodes(hand)
    assert linear.args[0] is x and linear.args[2] is b
    assert tuple(example_value(linear).shape) == tuple(expected_value.shape)
    (after,) = hand.run()
    # float64 sums of K products in another order: far below 1e-12 of their size.
    assert_close(after, before, rtol=1e-12)

    assert find_linears(hand.graph, hand) == 0


def must_not_fire(hand):
    before = targets(hand.graph)
    assert find_linears(hand.graph, hand) == 0
    assert targets(hand.graph) == before


def test_not_for_a_weight_that_is_an_argument_of_the_call():
    hand = HandGraph()
    hand.output(hand.call(torch.mm, hand.input(randn(3, 5)), hand.input(randn(5, 7))))
    must_not_fire(hand)


def test_not_for_a_view_of_a_weight():
    hand = HandGraph()
    x, w = hand.input(randn(3, 5)), hand.constant(randn(9, 7))
    hand.output(hand.call(torch.mm, x, hand.call("narrow", w, 0, 0, 5)))
    must_not_fire(hand)


@pytest.mark.parametrize("view", [False, True])
def test_not_for_a_weight_that_the_graph_writes_to(view):
    hand = HandGraph()
    x, w = hand.input(randn(3, 5)), hand.constant(randn(5, 7))
    y = hand.call(torch.mm, x, w)
    hand.call("mul_", hand.call(operator.getitem, w, 0) if view else w, 2.0)
    hand.output(y)
    must_not_fire(hand)


@pytest.mark.parametrize("scalars", [{"beta": 0}, {"alpha": 2.0}])
def test_not_for_addmm_with_factors(scalars):
    hand = HandGraph()
    x, w, b = hand.input(randn(3, 5)), hand.constant(randn(5, 7)), hand.constant(randn(7))
    hand.output(hand.call(torch.addmm, b, x, w, **scalars))
    must_not_fire(hand)


@pytest.mark.parametrize("shape", [(3, 7), (1, 7), (1,)])
def test_not_for_addmm_whose_first_operand_is_no_bias(shape):
    hand = HandGraph()
    x, w, b = hand.input(randn(3, 5)), hand.constant(randn(5, 7)), hand.input(randn(*shape))
    hand.output(hand.call(torch.addmm, b, x, w))
    must_not_fire(hand)


def test_not_for_a_product_from_the_left():
    hand = HandGraph()
    hand.output(hand.call(torch.mm, hand.constant(randn(3, 5)), hand.input(randn(5, 7))))
    must_not_fire(hand)


def test_not_for_a_product_into_a_given_tensor():
    hand = HandGraph()
    x, w, out = hand.input(randn(3, 5)), hand.constant(randn(5, 7)), hand.input(randn(3, 7))
    hand.output(hand.graph.call_function(torch.mm, (x, w), {"out": out}))
    must_not_fire(hand)


def test_batched_weights_are_no_linear_layer():
    hand = HandGraph()
    hand.output(hand.call(torch.matmul, hand.input(randn(2, 3, 5)), hand.constant(randn(2, 5, 7))))
    must_not_fire(hand)


def test_a_shared_weight_is_found_at_every_use():
    hand = HandGraph()
    x, w = hand.input(randn(3, 5)), hand.constant(randn(5, 5))
    hand.output(hand.call(torch.mm, hand.call(torch.mm, x, w), w))
    assert find_linears(hand.graph, hand) == 2
    assert len(linear_nodes(hand)) == 2


def test_batch_and_sequence_length_stay_symbolic():
    hand = HandGraph()
    x, w = hand.input(randn(2, 3, 5), dynamic=(0, 1)), hand.constant(randn(5, 7))
    hand.output(hand.call(operator.matmul, x, w))
    with dynamo.symbolic_sizes():
        assert find_linears(hand.graph, hand) == 1
    (linear,) = linear_nodes(hand)
    batch, length, features = example_value(linear).shape
    assert isinstance(batch, torch.SymInt) and isinstance(length, torch.SymInt) and features == 7
    assert not hand._fake_mode.shape_env.guards  # nothing was specialized
