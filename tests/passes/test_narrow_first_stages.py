"""Graphs on the CPU stand for graphs on a GPU, except in tests of the device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import HandGraph
from support.strategies import random_signs, seeds, sizes

from dbf_compile.kernels.sign_matmul.regimes import DECODE_TOKENS
from dbf_compile.passes import narrow_first_stages as module
from dbf_compile.passes.narrow_first_stages import narrow_first_stages
from dbf_compile.signs import interleave, pack_signs

SIGN_MATMUL = torch.ops.dbf.sign_matmul.default
MANY = DECODE_TOKENS + 1
on_gpu = module.on_gpu


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda x: True)


def words(rows, cols, seed):
    return interleave(pack_signs(random_signs(rows, cols, seed)))


def layers(
    readers=1,
    tokens=MANY,
    features=(37, 24, 5),
    seed=0,
    dtypes=(torch.bfloat16, None),
    results=(torch.bfloat16,),
    interleaved=True,
):
    """Return a graph of factored layers that share their first stage, and the node of that stage.

    Activations and scales are at most 1.

    Args:
        features: K, R and N.
        dtypes: of the input, and of the first stage.
        results: dtypes of the layers, in turn.
    """
    K, R, N = features
    generator = torch.Generator().manual_seed(seed)
    hand = HandGraph()
    x = hand.input((2 * torch.rand(tokens, K, generator=generator) - 1).to(dtypes[0]))
    vector = lambda size: hand.constant(torch.rand(size, generator=generator).half())  # noqa: E731
    h = hand.call(
        SIGN_MATMUL,
        x,
        hand.constant(words(R, K, seed)),
        vector(K),
        vector(R),
        dtype=dtypes[1],
        interleaved=interleaved,
    )
    ends = [
        hand.call(
            SIGN_MATMUL,
            h,
            hand.constant(words(N, R, seed + 1 + index)),
            None,
            vector(N),
            dtype=results[index % len(results)],
            interleaved=interleaved,
        )
        for index in range(readers)
    ]
    hand.output(*(hand.call(torch.neg, y) for y in ends))
    return hand, h


@given(
    readers=st.integers(1, 3),
    tokens=st.integers(MANY, 2 * MANY),
    K=sizes,
    R=sizes,
    N=sizes,
    seed=seeds,
    narrow=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_what_tensor_cores_read_is_narrowed(readers, tokens, K, R, N, seed, narrow):
    hand, h = layers(readers, tokens, (K, R, N), seed, (narrow, None), (narrow,))
    before = hand.run()
    assert narrow_first_stages(hand.graph) == 1
    assert h.meta["example_value"].dtype == narrow
    for old, new in zip(before, hand.run(), strict=True):
        assert new.dtype == old.dtype
        # Each of R sums of K numbers up to 1 is rounded before they are added, and so is the result.
        error = (new.double() - old.double()).abs().max()
        assert error <= torch.finfo(narrow).eps * (R * K / 2 + old.double().abs().max())
    assert narrow_first_stages(hand.graph) == 0


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": DECODE_TOKENS},  # summed as exactly as in float32
        {"dtypes": (torch.float32, None)},  # activations are split into three
        {"results": (torch.float32,)},
        {"results": (None,)},
        {"readers": 2, "results": (torch.bfloat16, torch.float16)},
        {"readers": 2, "results": (torch.bfloat16, None)},
        {"dtypes": (torch.bfloat16, torch.bfloat16)},
        {"interleaved": False},  # the kernels need interleaved words
    ],
    ids=str,
)
def test_not_for_others(case):
    hand, h = layers(**case)
    dtype = h.meta["example_value"].dtype
    assert narrow_first_stages(hand.graph) == 0
    assert h.meta["example_value"].dtype == dtype


def test_not_what_others_read_too():
    hand = HandGraph()
    x = hand.input(torch.randn(MANY, 37).bfloat16())
    h = hand.call(SIGN_MATMUL, x, hand.constant(words(24, 37, 0)), interleaved=True)
    signs = hand.constant(words(5, 24, 1))
    y = hand.call(SIGN_MATMUL, h, signs, dtype=torch.bfloat16, interleaved=True)
    hand.output(y, hand.call(torch.neg, h))
    assert narrow_first_stages(hand.graph) == 0


def test_not_what_is_scaled_before_it_is_rounded():
    hand = HandGraph()
    x = hand.input(torch.randn(MANY, 37).bfloat16())
    h = hand.call(SIGN_MATMUL, x, hand.constant(words(24, 37, 0)), interleaved=True)
    signs = hand.constant(words(5, 24, 1))
    scale = hand.constant(torch.rand(24))
    hand.output(hand.call(SIGN_MATMUL, h, signs, scale, dtype=torch.bfloat16, interleaved=True))
    assert narrow_first_stages(hand.graph) == 0


def test_not_on_the_cpu(monkeypatch):
    monkeypatch.setattr(module, "on_gpu", on_gpu)
    hand, _ = layers()
    assert narrow_first_stages(hand.graph) == 0
