"""Graphs on the CPU stand for graphs on a GPU, except in tests of the device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import HandGraph, targets
from support.strategies import FLOAT_DTYPES, random_signs, seeds, sizes

from dbf_compile.kernels.sign_matmul.regimes import DECODE_TOKENS
from dbf_compile.passes import group_siblings as module
from dbf_compile.passes.group_siblings import MOST, group_siblings
from dbf_compile.signs import interleave, pack_signs

SIGN_MATMUL = torch.ops.dbf.sign_matmul.default
on_gpu = module.on_gpu


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda x: True)


def siblings(
    rows, shape=(3, 37), seed=0, x_dtype=torch.float32, vectors=True, scales=1, dynamic=(), **settings
):
    """Return a graph of products of one input, the input, and the products.

    Args:
        rows: of the sign matrices.
        shape: of the input.
        vectors: whether there are out_scales and biases.
        scales: number of in_scales.
        settings: further arguments of the products, by name.
    """
    K, interleaved = shape[1], settings.setdefault("interleaved", True)
    generator = torch.Generator().manual_seed(seed)
    hand = HandGraph()
    x = hand.input(torch.randn(*shape, generator=generator).to(x_dtype), dynamic)
    in_scales = [hand.constant(torch.rand(K, generator=generator)) for _ in range(scales)]
    products = []
    for index, N in enumerate(rows):
        words = pack_signs(random_signs(N, K, seed + index))
        signs = hand.constant(interleave(words) if interleaved else words)
        out_scale, bias = (
            hand.constant(torch.rand(N, generator=generator).half()) if vectors else None for _ in range(2)
        )
        scale = in_scales[index % scales]
        products.append(hand.call(SIGN_MATMUL, x, signs, scale, out_scale, bias, **settings))
    return hand, x, products


@settings(max_examples=50)
@given(
    rows=st.lists(sizes, min_size=2, max_size=MOST),
    tokens=st.integers(1, DECODE_TOKENS),
    K=sizes,
    seed=seeds,
    x_dtype=st.sampled_from(FLOAT_DTYPES),
    dtype=st.sampled_from((None, *FLOAT_DTYPES)),
    vectors=st.booleans(),
)
def test_siblings_become_one_product_of_equal_values(rows, tokens, K, seed, x_dtype, dtype, vectors):
    hand, _, products = siblings(rows, (tokens, K), seed, x_dtype, vectors, dtype=dtype)
    hand.output(*(hand.call(torch.neg, y) for y in products))
    before = hand.run()
    assert group_siblings(hand.graph) == len(rows) - 1
    assert targets(hand.graph).count("sign_matmul_group.default") == 1
    assert "sign_matmul.default" not in targets(hand.graph)
    after = hand.run()
    for old, new in zip(before, after, strict=True):
        assert new.dtype == old.dtype
        torch.testing.assert_close(new, old)
    assert group_siblings(hand.graph) == 0


def test_more_than_fit_in_a_launch_are_several():
    hand, _, products = siblings([5] * (MOST + 2))
    hand.output(*products)
    before = hand.run()
    assert group_siblings(hand.graph) == MOST
    torch.testing.assert_close(hand.run(), before)


def test_what_a_node_says_of_itself_is_true():
    hand, _, products = siblings([5, 6], x_dtype=torch.bfloat16, dtype=torch.bfloat16)
    trace = object()
    products[1].meta["stack_trace"] = trace
    hand.output(*products)
    group_siblings(hand.graph)
    last = hand.graph.output_node().args[0][1]
    assert (last.meta["val"].shape, last.meta["val"].dtype) == ((3, 6), torch.bfloat16)
    assert last.meta["stack_trace"] is trace


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"rows": [5]}, id="one alone"),
        pytest.param({"rows": [5, 6], "scales": 2}, id="other scales"),
        pytest.param({"rows": [5, 6], "shape": (DECODE_TOKENS + 1, 37)}, id="many tokens"),
        pytest.param({"rows": [5, 6], "dynamic": (0,)}, id="any number of tokens"),
        pytest.param({"rows": [5, 6], "x_dtype": torch.float64}, id="double precision"),
        pytest.param({"rows": [17, 18], "interleaved": False}, id="words row by row"),
    ],
)
def test_not_for_others(case):
    hand, _, products = siblings(**case)
    hand.output(*products)
    assert group_siblings(hand.graph) == 0


def test_not_on_the_cpu(monkeypatch):
    monkeypatch.setattr(module, "on_gpu", on_gpu)
    hand, _, products = siblings([5, 6])
    hand.output(*products)
    assert group_siblings(hand.graph) == 0


def test_not_where_the_input_changes_in_between():
    hand, x, products = siblings([5, 6])
    with hand.graph.inserting_after(products[0]):
        write = hand.graph.call_method("add_", (x, 1.0))
        write.meta["example_value"] = x.meta["example_value"]
    hand.output(*products)
    (*before,) = hand.run()
    assert group_siblings(hand.graph) == 0
    torch.testing.assert_close(list(hand.run()), before)


def test_not_where_signs_are_computed():
    hand, x, products = siblings([5, 6])
    signs = hand.call(torch.neg, products[0].args[1])
    hand.output(products[0], hand.call(SIGN_MATMUL, x, signs, products[0].args[2], interleaved=True))
    hand.graph.erase_node(products[1])
    assert group_siblings(hand.graph) == 0
