import operator
from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from support.graphs import HandGraph, targets
from support.strategies import seeds

import dbf_compile.passes
from dbf_compile.passes.allow_fast_sums import allow_fast_sums
from dbf_compile.passes.pipeline import PIPELINE, POST_GRAD_PIPELINE, run_pipeline
from dbf_compile.passes.prepare_layers import prepare_layers
from dbf_compile.testing import assert_close


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block(seed=0, dynamic=()):
    """A small transformer-like block: q and k on one input, a Conv1D, a tied head."""
    hand = HandGraph()
    ids = hand.input(torch.tensor([1, 4, 2]), dynamic=dynamic)
    table = hand.constant(randn(10, 13, seed=seed))
    q, k = hand.constant(randn(7, 13, seed=seed + 1)), hand.constant(randn(7, 13, seed=seed + 2))
    conv, bias = hand.constant(randn(7, 13, seed=seed + 3)), hand.constant(randn(13, seed=seed + 4))
    x = hand.call(F.embedding, ids, table)
    a = hand.call(F.linear, x, q, None)
    b = hand.call(operator.matmul, x, hand.call("t", k))
    c = hand.call(torch.addmm, bias, hand.call(torch.tanh, hand.call("add", a, b)), conv)
    hand.output(hand.call(F.linear, c, table, None))
    return hand


@settings(max_examples=50)
@given(seeds)
def test_the_whole_pipeline_keeps_the_meaning_and_does_nothing_the_second_time(seed):
    hand, original = block(seed), block(seed)
    counts = run_pipeline(hand.graph, hand)
    assert counts == {
        "find_linears": 2,
        "merge_shared_inputs": 1,
        "replace_linears": 2,
        "share_first_stages": 0,
        "verify": 0,
    }
    (after,), (dense,) = hand.run(), hand.run_dense(original)
    # float64 throughout, sums in another order; the tanh has no steep slope.
    assert_close(after, dense, rtol=1e-10)
    assert set(run_pipeline(hand.graph, hand).values()) == {0}


def test_the_tied_head_stays_dense():
    hand = block()
    run_pipeline(hand.graph, hand)
    assert targets(hand.graph).count("linear") == 1
    assert targets(hand.graph).count("sign_matmul") == 4


def test_a_graph_without_linear_layers_is_left_alone():
    hand = HandGraph()
    hand.output(hand.call(torch.relu, hand.input(randn(3))))
    before = str(hand.graph)
    assert set(run_pipeline(hand.graph, hand).values()) == {0}
    assert str(hand.graph) == before


def test_every_pass_is_a_file_of_its_name_and_in_the_pipeline():
    folder = Path(dbf_compile.passes.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "graph", "pipeline"}
    passes = (*PIPELINE, *POST_GRAD_PIPELINE, allow_fast_sums, prepare_layers)
    assert files == {step.__name__ for step in passes}
    assert all(step.__module__ == f"dbf_compile.passes.{step.__name__}" for step in passes)
