import pytest
import torch
from support.graphs import HandGraph
from support.strategies import random_factors

from dbf_compile.errors import GraphInvariantError
from dbf_compile.passes.graph import example_value
from dbf_compile.passes.verify import verify


def product_graph(K=37, N=24, dynamic=()):
    hand = HandGraph()
    x = hand.input(torch.randn(3, K), dynamic=dynamic)
    signs = hand.constant(random_factors(K, N, 4).signs_in)
    y = hand.call(torch.ops.dbf.sign_matmul, x, signs)
    return hand, x, signs, y


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_a_legal_graph_passes_unchanged(dynamic):
    hand, _, _, y = product_graph(dynamic=dynamic)
    hand.output(y)
    before = str(hand.graph)
    assert verify(hand.graph, hand) == 0
    assert str(hand.graph) == before


@pytest.mark.parametrize("of", ["x", "signs"])
def test_a_symbolic_number_of_features_is_a_known_one(of):
    hand, x, signs, y = product_graph(dynamic=(0, 1) if of == "x" else ())
    if of == "signs":
        signs = hand.input(random_factors(37, 24, 4).signs_in, dynamic=(0,))
        y = hand.call(torch.ops.dbf.sign_matmul, x, signs)
    hand.output(y)
    verify(hand.graph, hand)
    rows, columns = example_value(y).shape[-1], example_value(x).shape[-1]
    assert (int(rows), int(columns)) == (24, 37)
    assert is_known(rows) and is_known(columns)


def is_known(size):
    """Return whether a size is a number, or a symbol that stands for one."""
    return isinstance(size, int) or not size.node.expr.free_symbols


def test_a_read_before_the_write_is_refused():
    hand, x, _, y = product_graph()
    late = hand.graph.call_function(torch.relu, (x,))
    y.args = (late, y.args[1])
    hand.output(y)
    with pytest.raises(GraphInvariantError, match="malformed"):
        verify(hand.graph, hand)


@pytest.mark.parametrize(
    "signs",
    [
        torch.zeros(24, 3, dtype=torch.int32),  # words for another K
        torch.zeros(24, 2, dtype=torch.int64),  # other dtype
        torch.zeros(24 * 2, dtype=torch.int32),  # no matrix
        torch.zeros(23, 2, dtype=torch.int32),  # other N than the output
    ],
)
def test_signs_of_the_wrong_size_or_dtype_are_refused(signs):
    hand, x, _, y = product_graph()
    y.args = (x, hand.constant(signs))
    hand.output(y)
    with pytest.raises(GraphInvariantError, match="sign_matmul"):
        verify(hand.graph, hand)


def test_a_product_without_metadata_is_refused():
    hand, _, _, y = product_graph()
    del y.meta["example_value"]
    hand.output(y)
    with pytest.raises(GraphInvariantError, match="example value"):
        verify(hand.graph, hand)


def test_writing_to_signs_is_refused():
    hand, _, signs, y = product_graph()
    hand.call("zero_", hand.call("view", signs, -1))
    hand.output(y)
    with pytest.raises(GraphInvariantError, match="writes to signs"):
        verify(hand.graph, hand)
