"""Text: kinds take turns, every window is used once, the first ones of a kind are kept back."""

import pytest
import torch

pytest.importorskip("transformers")

from support.models.tiny import tiny_llama

from dbf_compile.errors import ConversionError
from dbf_compile.finetuning.text import Text
from dbf_compile.options import FinetuneConfig

KINDS = {"web": [list(range(1, 61))], "code": [list(range(101, 241))]}


def read(data=KINDS, **options):
    settings = {"length": 10, "holdout": 2, "tokens": 1000, "progress": False, **options}
    return Text.read(data, None, tiny_llama(1), FinetuneConfig(**settings))


def test_the_first_windows_of_every_kind_are_kept_back_and_the_others_used_once():
    text = read()
    assert [windows[:, 0].tolist() for windows in text.judging.values()] == [[1, 11], [101, 111]]
    assert sorted(text.learning[:, 0].tolist()) == [*range(21, 61, 10), *range(121, 241, 10)]


def test_kinds_take_turns_as_far_as_tokens_are_asked_for():
    assert sorted(read(tokens=60).learning[:, 0].tolist()) == [21, 31, 41, 121, 131, 141]


def test_the_order_follows_from_the_seed():
    assert torch.equal(read(seed=3).learning, read(seed=3).learning)
    assert not torch.equal(read(seed=3).learning, read(seed=4).learning)


def test_text_that_leaves_nothing_to_learn_from_is_refused():
    with pytest.raises(ConversionError, match="no more than 2 windows of 10 tokens"):
        read({"web": [list(range(20))]})
    with pytest.raises(ConversionError, match="web"):  # a kind by its name
        read({"web": [[1, 2]], "code": [list(range(100))]})
