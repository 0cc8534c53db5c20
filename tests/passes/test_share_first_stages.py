import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import random_factors, seeds, sizes

from dbf_compile.passes.share_first_stages import share_first_stages


def factored_siblings(
    rows, K=37, seed=0, shared=True, operator=torch.ops.dbf.sign_matmul, dtype=torch.float64
):
    """Return a graph of factored layers on one input, as their modules compute them."""
    hand = HandGraph()
    x = hand.input(torch.randn(3, K, dtype=dtype, generator=torch.Generator().manual_seed(seed)))
    factors = random_factors(K, 24, sum(rows), seed=seed)
    names = ("signs_in", "scale_in", "scale_mid")
    first = {name: hand.constant(factors.tensors()[name]) for name in names}
    outputs = []
    for part in factors.split(rows):
        own = first if shared else {name: hand.constant(part.tensors()[name]) for name in names}
        signs_out, scale_out = hand.constant(part.signs_out), hand.constant(part.scale_out)
        h = hand.call(operator, x, own["signs_in"], own["scale_in"])
        outputs.append(hand.call(operator, h, signs_out, own["scale_mid"], scale_out, None, dtype))
    return hand, x, outputs


def products(hand):
    return sum(name.startswith("sign_matmul") for name in targets(hand.graph))


@settings(max_examples=50)
@given(rows=st.lists(sizes, min_size=2, max_size=4), K=sizes, seed=seeds, overload=st.booleans())
def test_siblings_share_their_first_stage(rows, K, seed, overload):
    operator = torch.ops.dbf.sign_matmul.default if overload else torch.ops.dbf.sign_matmul
    hand, _, outputs = factored_siblings(rows, K, seed, operator=operator)
    hand.output(*[hand.call(torch.neg, y) for y in outputs])
    before = hand.run()
    assert share_first_stages(hand.graph, hand) == len(rows) - 1
    assert products(hand) == 1 + len(rows)
    # The same operations on the same numbers, some of them once instead of twice.
    assert all(torch.equal(after, expected) for after, expected in zip(hand.run(), before, strict=True))
    assert share_first_stages(hand.graph, hand) == 0


def test_not_for_layers_with_factors_of_their_own():
    hand, _, outputs = factored_siblings([4, 5], shared=False)
    hand.output(*[hand.call(torch.neg, y) for y in outputs])
    assert share_first_stages(hand.graph, hand) == 0
    assert products(hand) == 4


@pytest.mark.parametrize("which", ["input", "result"])
def test_not_on_memory_that_is_written_to(which):
    hand = HandGraph()
    factors = random_factors(5, 24, 4)
    x, signs = hand.input(torch.randn(3, 5)), hand.constant(factors.signs_in)
    first = hand.call(torch.ops.dbf.sign_matmul, x, signs)
    hand.call("add_", x if which == "input" else first, 1.0)
    second = hand.call(torch.ops.dbf.sign_matmul, x, signs)
    hand.output(hand.call(torch.sub, second, first))
    before = hand.run()
    assert share_first_stages(hand.graph, hand) == 0
    assert torch.equal(hand.run()[0], before[0])


def test_two_outputs_do_not_become_one_tensor():
    hand = HandGraph()
    x, signs = hand.input(torch.randn(3, 5)), hand.constant(random_factors(5, 24, 4).signs_in)
    hand.output(*[hand.call(torch.ops.dbf.sign_matmul, x, signs) for _ in range(2)])
    assert share_first_stages(hand.graph, hand) == 0
    first, second = hand.run()
    assert first is not second
