import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import seeds, sizes

from dbf_compile.passes.graph import example_value, is_linear, weights_of
from dbf_compile.passes.merge_shared_inputs import merge_shared_inputs
from dbf_compile.testing import assert_close


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def siblings(rows, biases, shape=(3, 5), transposed=(), seed=0, hand=None, dynamic=()):
    """Return a graph of linear layers that read one input, the input of ``shape``, and the outputs."""
    hand = hand or HandGraph()
    K = shape[1]
    x = hand.input(randn(*shape, seed=seed), dynamic=dynamic)
    outputs = []
    for index, (N, has_bias) in enumerate(zip(rows, biases, strict=True)):
        b = hand.constant(randn(N, seed=seed + 2 * index + 1)) if has_bias else None
        if index in transposed:
            w = hand.call("t", hand.constant(randn(K, N, seed=seed + 2 * index + 2)))
        else:
            w = hand.constant(randn(N, K, seed=seed + 2 * index + 2))
        outputs.append(hand.call(F.linear, x, w, b))
    return hand, x, outputs


def linears(hand):
    return [node for node in hand.graph.nodes if is_linear(node)]


def must_not_fire(hand):
    before = targets(hand.graph)
    assert merge_shared_inputs(hand.graph, hand) == 0
    assert targets(hand.graph) == before


@settings(max_examples=50)
@given(rows=st.lists(sizes, min_size=2, max_size=4), data=st.data(), K=sizes, M=st.integers(0, 4), seed=seeds)
def test_siblings_become_one_layer_of_equal_values(rows, data, K, M, seed):
    biases = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    transposed = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    hand, x, outputs = siblings(rows, biases, (M, K), transposed, seed)
    hand.output(*[hand.call(torch.neg, y) for y in outputs])
    before = hand.run()

    assert merge_shared_inputs(hand.graph, hand) == 1
    (merged,) = linears(hand)
    assert merged.args[0] is x
    assert [hand.rows(weight) for weight in weights_of(merged.args[1], hand)] == rows
    for after, expected in zip(hand.run(), before, strict=True):
        # float64 sums of K products in another order: far below 1e-12 of their size.
        assert_close(after, expected, rtol=1e-12)

    assert merge_shared_inputs(hand.graph, hand) == 0


def test_layers_of_several_inputs_form_several_stacks():
    hand, _, first = siblings([2, 3], [False, False])
    hand, _, second = siblings([4, 5], [True, True], hand=hand)
    hand.output(*first, *second)
    assert merge_shared_inputs(hand.graph, hand) == 2
    assert len(linears(hand)) == 2


def test_not_for_a_layer_on_its_own():
    hand, _, outputs = siblings([4], [True])
    hand.output(*outputs)
    must_not_fire(hand)


def test_not_for_layers_the_source_keeps_apart_or_dense():
    hand, _, outputs = siblings([4, 4], [False, False], hand=HandGraph(group=lambda weight: weight.node.name))
    hand.output(*outputs)
    must_not_fire(hand)
    hand, _, outputs = siblings([4, 4], [False, False], hand=HandGraph(group=lambda weight: None))
    hand.output(*outputs)
    must_not_fire(hand)


def test_not_when_the_input_changes_in_between():
    hand = HandGraph()
    x, w, v = hand.input(randn(3, 5)), hand.constant(randn(4, 5)), hand.constant(randn(4, 5, seed=1))
    first = hand.call(F.linear, x, w, None)
    hand.call("add_", hand.call("view", x, 15), 1.0)  # through a view
    second = hand.call(F.linear, x, v, None)
    hand.output(first, second)
    must_not_fire(hand)


def test_not_when_a_bias_changes_in_between():
    hand, _, (first, second) = siblings([4, 4], [True, True])
    with hand.graph.inserting_after(first):
        write = hand.graph.call_method("add_", (second.args[2], 1.0))
        write.meta["example_value"] = example_value(second.args[2])
    hand.output(first, second)
    must_not_fire(hand)


def test_not_when_a_function_of_the_user_reads_the_input_in_between():
    hand = HandGraph()
    x, w, v = hand.input(randn(3, 5)), hand.constant(randn(4, 5)), hand.constant(randn(4, 5, seed=1))
    first = hand.call(F.linear, x, w, None)
    between = hand.call(lambda x: x + 1, x)
    hand.output(first, between, hand.call(F.linear, x, v, None))
    must_not_fire(hand)


def test_other_memory_may_change_in_between():
    hand = HandGraph()
    x, w, v = hand.input(randn(3, 5)), hand.constant(randn(4, 5)), hand.constant(randn(4, 5, seed=1))
    first = hand.call(F.linear, x, w, None)
    hand.call("add_", hand.call("clone", x), 1.0)
    second = hand.call(F.linear, x, v, None)
    hand.output(first, second)
    assert merge_shared_inputs(hand.graph, hand) == 1


def test_not_when_a_bias_is_made_after_the_first_layer():
    hand = HandGraph()
    x, w, v = hand.input(randn(3, 5)), hand.constant(randn(4, 5)), hand.constant(randn(4, 5, seed=1))
    first = hand.call(F.linear, x, w, None)
    bias = hand.call("sum", first, 0)
    second = hand.call(F.linear, x, v, bias)
    hand.output(second)
    must_not_fire(hand)


@pytest.mark.parametrize("which", [0, 1])
def test_not_for_a_weight_that_is_written_to(which):
    hand, _, outputs = siblings([4, 4], [False, False])
    hand.call("zero_", outputs[which].args[1])
    hand.output(*outputs)
    must_not_fire(hand)


def test_not_for_a_weight_that_an_embedding_reads():
    hand, _, outputs = siblings([4, 4], [False, False])
    hand.output(*outputs, hand.call(F.embedding, hand.input(torch.tensor([1])), outputs[0].args[1]))
    must_not_fire(hand)


def test_layers_of_other_output_dtypes_stay_apart():
    hand, _, outputs = siblings([4, 4], [False, False])
    # As under autocast, entered between the two.
    outputs[1].meta["example_value"] = example_value(outputs[1]).to(torch.bfloat16)
    hand.output(*outputs)
    must_not_fire(hand)


def test_batch_stays_symbolic_and_metadata_is_right():
    hand, _, outputs = siblings([2, 3], [True, False], dynamic=(0,))
    for y in outputs:
        y.meta["stack_trace"] = y.name
    users = [hand.call(torch.neg, y) for y in outputs]
    hand.output(*users)
    assert merge_shared_inputs(hand.graph, hand) == 1
    for user, columns, origin in zip(users, (2, 3), outputs, strict=True):
        (part,) = user.all_input_nodes
        rows, cols = example_value(part).shape
        assert isinstance(rows, torch.SymInt) and cols == columns
        assert part.meta["stack_trace"] == origin.name
    assert not hand._fake_mode.shape_env.guards


def rows_of(y):
    """Views of a result, and what may be done to it only in the memory that a layer's result has."""
    return {
        "one axis": lambda hand: hand.call("view", y, -1),
        "one axis by an operator": lambda hand: hand.call(torch.ops.aten.view.default, y, [-1]),
        "a view of a view": lambda hand: hand.call("view", hand.call("view", y, 2, 3, 2, 2), 12, 2),
        "a reshape": lambda hand: hand.call("reshape", y, -1),
        "other numbers": lambda hand: hand.call("view", hand.call("view", y, torch.int64), -1),
        "other strides": lambda hand: hand.call("as_strided", y, (3,), (4,)),
        "complex numbers": lambda hand: hand.call(torch.view_as_complex, hand.call("view", y, 2, 3, 2, 2)),
        "a write through a view": lambda hand: hand.call("add_", hand.call("view", y, -1), 1),
        "itself": lambda hand: y,
    }


@pytest.mark.parametrize("what", rows_of(None))
@pytest.mark.parametrize("rows", [[4, 3], [4, 4]])
def test_views_of_a_part_are_those_of_a_result(what, rows):
    def graph():
        hand, _, (y, z) = siblings(rows, [True, False], (6, 5))
        read = rows_of(y)[what](hand)
        hand.output(hand.call("clone", read) if what != "itself" else read, hand.call(torch.neg, y), z)
        return hand

    hand = graph()
    assert merge_shared_inputs(hand.graph, hand) == 1
    for after, expected in zip(hand.run(), graph().run(), strict=True):
        assert after.shape == expected.shape
        after, expected = (value.view(torch.float64) for value in (after, expected))
        assert_close(after, expected, rtol=1e-12)
    assert hand.run()[2].stride() == graph().run()[2].stride()  # a result of the graph


def test_what_only_computes_reads_a_part_in_place():
    hand, _, (y, z) = siblings([4, 3], [True, False], (6, 5))
    hand.output(hand.call(torch.neg, hand.call("view", y, 6, 2, 2)), hand.call(torch.relu, z))
    merge_shared_inputs(hand.graph, hand)
    assert targets(hand.graph)[-6:] == ["linear", "narrow", "narrow", "reshape", "neg", "relu"]
