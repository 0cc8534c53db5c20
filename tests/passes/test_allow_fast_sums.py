import torch
from support.graphs import HandGraph
from support.strategies import random_factors

from dbf_compile.passes.allow_fast_sums import allow_fast_sums
from dbf_compile.passes.graph import arguments_of


def graph(*arguments, **settings):
    hand = HandGraph()
    factors = random_factors(37, 24, 5)
    x, signs = hand.input(torch.randn(3, 37)), hand.constant(factors.signs_in)
    y = hand.call(torch.ops.dbf.sign_matmul, x, signs, *arguments, **settings)
    hand.output(hand.call(torch.neg, y))
    return hand, y


def test_every_spelling_of_the_arguments_is_marked_once():
    for arguments, settings in (
        ((), {}),
        ((None, None, None, torch.float32), {}),
        ((None, None, None, None, False, False), {}),
        ((), {"interleaved": False, "fast": False}),
    ):
        hand, y = graph(*arguments, **settings)
        before = {**arguments_of(y), "fast": True}
        exact = hand.run()[0]
        assert allow_fast_sums(hand.graph) == 1
        assert arguments_of(y) == before
        assert (hand.run()[0] - exact).norm() <= 1e-4 * exact.norm()
        assert allow_fast_sums(hand.graph) == 0


def test_not_for_other_calls():
    hand = HandGraph()
    x = hand.input(torch.randn(3, 37))
    hand.output(hand.call(torch.neg, x))
    assert allow_fast_sums(hand.graph) == 0
