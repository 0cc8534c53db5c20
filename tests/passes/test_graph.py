import operator

import pytest
import torch
import torch.nn.functional as F
from support.graphs import HandGraph, targets

from dbf_compile.errors import GraphInvariantError
from dbf_compile.passes.graph import (
    Weight,
    emit,
    example_value,
    is_linear,
    is_pure,
    is_tensor,
    mutated_by,
    only_linears_read,
    remove_unused,
    replace,
    storage_of,
    transposed_operand,
    weights_of,
)


def weight_graph():
    hand = HandGraph()
    x, w = hand.input(torch.randn(3, 5)), hand.constant(torch.randn(7, 5))
    return hand, x, w


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("t", ()),
        ("transpose", (0, 1)),
        ("transpose", (-1, -2)),
        ("permute", (1, 0)),
        ("permute", ((1, 0),)),
        ("swapaxes", (1, 0)),
        (torch.t, ()),
        (torch.transpose, (1, 0)),
        (torch.permute, ((1, 0),)),
        (getattr, ("T",)),
        (getattr, ("mT",)),
        (torch.ops.aten.t.default, ()),
        (torch.ops.aten.permute.default, ([1, 0],)),
        (torch.ops.aten.transpose.int, (0, 1)),
    ],
)
def test_every_spelling_of_a_transpose_is_read(target, rest):
    hand, _, w = weight_graph()
    node = hand.call(target, w, *rest)
    assert torch.equal(
        torch.fx.GraphModule({}, _returning(hand, node))(*hand.inputs.values()), hand.inputs[w].t()
    )
    assert transposed_operand(node) is w
    assert weights_of(node, hand) == (Weight(w, True),)


def _returning(hand, node):
    hand.graph.output(node)
    return hand.graph


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("permute", (0, 1)),
        ("transpose", (0, 0)),
        ("contiguous", ()),
        ("neg", ()),
        (getattr, ("grad",)),
        (operator.getitem, (slice(0, 2),)),
    ],
)
def test_what_is_no_transpose_is_not_read_as_one(target, rest):
    hand, _, w = weight_graph()
    node = hand.graph.create_node(
        "call_method" if isinstance(target, str) else "call_function", target, (w, *rest)
    )
    assert transposed_operand(node) is None
    assert weights_of(node, hand) is None


def test_weights_of_reads_stacks_from_top_to_bottom():
    hand, x, w = weight_graph()
    v = hand.constant(torch.randn(5, 2))
    stack = hand.call(torch.cat, [w, hand.call("t", v)], 0)
    assert weights_of(stack, hand) == (Weight(w, False), Weight(v, True))
    assert weights_of(hand.call(torch.cat, [w, w], 1), hand) is None  # columns
    assert weights_of(hand.call(torch.cat, [w, x], 0), hand) is None  # x is no constant
    assert weights_of(3, hand) is None


def test_weights_of_wants_matrices():
    hand = HandGraph()
    assert weights_of(hand.constant(torch.randn(4)), hand) is None


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "which"),
    [
        ("add_", (1,), {}, [0]),
        (torch.relu_, (), {}, [0]),
        (F.relu, (), {"inplace": True}, [0]),
        (operator.iadd, (1,), {}, [0]),
        (operator.iand, (1,), {}, [0]),
        ("__ior__", (1,), {}, [0]),
        (operator.setitem, (0, 1.0), {}, [0]),
        (operator.delitem, (0,), {}, [0]),
        (torch.nn.init.zeros_, (), {}, [0]),
        (torch.ops.aten.mul_.Tensor, (2.0,), {}, [0]),
        ("__iadd__", (1,), {}, [0]),
        (F.relu, (True,), {}, [0]),
        (F.leaky_relu, (0.1, True), {}, [0]),
        # Dynamo leaves the choice of an overload open where the model does.
        (torch.ops.aten.mul_, (2.0,), {}, [0]),
        ("add", (1,), {}, []),
        ("__add__", (1,), {}, []),
        (F.relu, (False,), {}, []),
        (torch.ops.aten.mul, (2.0,), {}, []),
        (operator.add, (1,), {}, []),
        (torch.ops.aten.mul.Tensor, (2.0,), {}, []),
        (F.relu, (), {"inplace": False}, []),
        (F.relu, (), {}, []),
    ],
)
def test_mutated_by(target, args, kwargs, which):
    hand, x, _ = weight_graph()
    node = hand.graph.create_node(
        "call_method" if isinstance(target, str) else "call_function", target, (x, *args), kwargs
    )
    assert mutated_by(node) == tuple([x][i] for i in which)


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [
        (F.relu, {"inplace": True}),
        (F.dropout, {"p": 0.5, "inplace": True}),
        (torch.relu_, {}),
        (torch.ops.aten.relu_.default, {}),
    ],
)
def test_a_write_is_seen_where_all_arguments_have_names(target, kwargs):
    hand, x, _ = weight_graph()
    name = "self" if target is torch.ops.aten.relu_.default else "input"
    assert mutated_by(hand.graph.call_function(target, (), {name: x, **kwargs})) == (x,)


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [(F.embedding, {"max_norm": 0.1}), (F.batch_norm, {"training": True}), (torch.batch_norm, {})],
)
def test_functions_that_write_to_other_arguments_than_the_first_are_impure(target, kwargs):
    hand, x, w = weight_graph()
    assert mutated_by(hand.graph.call_function(target, (x, w), kwargs)) == (x, w)
    assert is_pure(hand.graph.call_function(F.embedding, (x, w)))


def test_mutated_by_sees_out_arguments():
    hand, x, w = weight_graph()
    for target in (torch.neg, torch.ops.aten.neg.out, torch.ops.aten.neg):
        assert w in mutated_by(hand.graph.call_function(target, (x,), {"out": w}))


def somebodys_function(x):
    return x + 1


@pytest.mark.parametrize("target", [somebodys_function, torch.ops.higher_order.cond, len])
def test_what_is_not_known_may_write_to_all_that_it_reads(target):
    hand, x, w = weight_graph()
    node = hand.graph.call_function(target, (x, [w]))
    assert not is_pure(node) and mutated_by(node) == (x, w)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (getattr, ("T",)),
        (operator.getitem, (0,)),
        (operator.and_, (1,)),
        (operator.invert, ()),
        (torch.Tensor.index_select, (0, 0)),
        (F.silu, ()),
        (F.scaled_dot_product_attention, (0, 0)),
        (torch.ops.dbf.sign_matmul, (0,)),
        ("__and__", (1,)),
        ("float", ()),
        ("index_select", (0, 0)),
    ],
)
def test_torchs_functions_are_pure_but_for_those_whose_name_says_otherwise(target, args):
    hand, x, _ = weight_graph()
    create = hand.graph.call_method if isinstance(target, str) else hand.graph.call_function
    assert is_pure(create(target, (x, *args)))


def test_an_operator_that_shows_no_body_may_write_to_all_that_it_is_given():
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    # How Dynamo calls a Triton kernel of the user.
    hand, x, w = weight_graph()
    node = hand.graph.call_function(
        triton_kernel_wrapper_mutation, (), {"kernel_idx": 0, "kwargs": {"in_ptr": w, "out_ptr": x}}
    )
    assert set(mutated_by(node)) == {x, w}


def test_views_share_a_storage_key_and_other_tensors_do_not():
    hand, x, w = weight_graph()
    assert storage_of(hand.call("t", w)) == storage_of(w)
    assert storage_of(hand.call(operator.getitem, w, slice(0, 2))) == storage_of(w)
    assert storage_of(hand.call("clone", w)) != storage_of(w)
    assert storage_of(x) != storage_of(w)


def test_emit_records_functions_methods_and_operators_with_metadata():
    hand, x, w = weight_graph()
    anchor = hand.call(torch.relu, x)
    anchor.meta["stack_trace"] = "somewhere in the model"
    hand.output(anchor)

    def compute(x, pair):
        return torch.ops.aten.neg.default(F.linear(x, torch.cat(pair)).to(torch.float64) * 2)

    node = emit(anchor, compute, x, [w, w])
    assert targets(hand.graph) == ["cat", "linear", "to", "mul", "neg.default", "relu"]
    assert example_value(node).dtype == torch.float64 and tuple(example_value(node).shape) == (3, 14)
    assert node.meta["stack_trace"] == "somewhere in the model"
    replace(anchor, node)
    (y,) = hand.run()
    value, weight = hand.inputs[x], hand.inputs[w]
    assert torch.equal(y, compute(value, [weight, weight]))


def test_emit_of_what_changes_nothing_gives_the_node_itself():
    hand, x, _ = weight_graph()
    anchor = hand.call(torch.relu, x)
    assert emit(anchor, lambda x: x.to(torch.float32), x) is x


def test_replace_removes_only_what_nobody_else_reads():
    hand, x, w = weight_graph()
    shared = hand.call("t", w)
    y = hand.call(torch.mm, x, shared)
    z = hand.call(torch.neg, shared)
    hand.output(y, z)
    replace(y, emit(y, torch.relu, x))
    assert targets(hand.graph) == ["t", "relu", "neg"]


def test_remove_unused_keeps_writing_nodes():
    hand, x, _ = weight_graph()
    write = hand.call("add_", x, 1)
    hand.output(x)
    remove_unused(write)
    assert targets(hand.graph) == ["add_"]


def test_only_linears_read():
    hand, x, w = weight_graph()
    hand.call(F.linear, x, w, None)
    hand.call(F.linear, x, hand.call(torch.cat, [hand.call("t", hand.call("t", w))], 0), None)
    assert only_linears_read(w)
    hand.call(F.embedding, hand.input(torch.tensor([1])), w)
    assert not only_linears_read(w)


def test_is_linear_wants_the_canonical_three_arguments():
    hand, x, w = weight_graph()
    assert is_linear(hand.call(F.linear, x, w, None))
    assert not is_linear(hand.call(F.linear, x, w))
    assert not is_linear(hand.call(F.linear, x, w, bias=None))


def test_a_node_without_example_value_is_an_error_that_names_it():
    hand, x, _ = weight_graph()
    node = hand.graph.call_function(torch.relu, (x,))
    assert not is_tensor(node)
    with pytest.raises(GraphInvariantError, match=r"relu.*example value"):
        example_value(node)


def test_exported_graphs_keep_their_values_under_val():
    _, x, _ = weight_graph()
    value = x.meta.pop("example_value")
    x.meta["val"] = value
    assert example_value(x) is value and is_tensor(x, 2)


def test_nodes_within_torch_func_have_the_memory_of_what_they_wrap_and_are_rewritten():
    hand = HandGraph()
    x, w = hand.input(torch.randn(4, 3, 5)), hand.constant(torch.randn(7, 5))
    values = []

    def inner(value):
        values.extend([value, value.view(-1), F.linear(value, example_value(w))])
        return values[-1]

    torch.func.vmap(torch.func.vmap(inner))(example_value(x))
    one, view, product = (hand.graph.call_function(torch.relu, (x,)) for _ in values)
    for node, value in zip((one, view, product), values, strict=True):
        node.meta["example_value"] = value
    assert storage_of(one) == storage_of(view) == storage_of(x) != storage_of(product)
    node = emit(product, lambda x, w: F.linear(x, w).relu(), one, w)
    assert example_value(node).shape == (7,)
    replace(product, node)
    assert example_value(node) is values[-1]


def test_a_replaced_node_leaves_its_memory_to_the_new_one():
    hand, x, w = weight_graph()
    y = hand.call(F.linear, x, w, None)
    view = hand.call("view", y, -1)
    hand.output(view)
    node = emit(y, F.linear, x, w, None)
    replace(y, node)
    assert storage_of(node) == storage_of(view)


def test_nested_tensors_have_no_dimensions():
    hand, x, w = weight_graph()
    node = hand.call(F.linear, x, w, None)
    node.meta["example_value"] = torch.nested.nested_tensor([torch.randn(3, 7)], layout=torch.jagged)
    assert not is_tensor(node) and not is_linear(node)
