"""Batches: windows of consecutive tokens from files, texts and rows."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbf_compile.calibration.batches import token_batches
from dbf_compile.errors import ConversionError, OptionError


def bytewise(text):
    """A tokenizer as simple as can be: one token a byte."""
    return {"input_ids": list(text.encode())}


def windows(source, **options):
    batches = list(token_batches(source, bytewise, **options))
    return torch.cat([batch["input_ids"] for batch in batches])


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=6),
    st.integers(2, 20),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_windows_are_the_text_in_order(texts, length, count, batch_size):
    joined = "\n\n".join(texts).encode()
    expected = [list(joined[i : i + length]) for i in range(0, len(joined) - length + 1, length)][:count]
    if not expected:
        with pytest.raises(ConversionError, match="at least one window"):
            windows(texts, length=length, count=count)
        return
    batches = list(token_batches(texts, bytewise, length=length, count=count, batch_size=batch_size))
    assert [row for batch in batches for row in batch["input_ids"].tolist()] == expected
    assert all(len(batch["input_ids"]) == batch_size for batch in batches[:-1])


def test_a_file_a_text_and_rows_give_the_same(tmp_path):
    text = "one two three four five six"
    path = tmp_path / "text.txt"
    path.write_text(text)
    expected = windows([text], length=5)
    for source in (path, str(path), [{"text": text, "id": 3}], iter([text])):
        assert torch.equal(windows(source, length=5), expected)
    assert torch.equal(windows([{"body": text}], length=5, column="body"), expected)


@pytest.mark.skipif(find_spec("datasets") is None, reason="the datasets package is not installed")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_datasets_object_is_read_by_its_column(tmp_path, streaming):
    from datasets import load_dataset

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "abc def"}\n{"text": "ghi jkl"}\n')
    rows = load_dataset(
        "json", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    assert torch.equal(windows(rows, length=4), windows(["abc def", "ghi jkl"], length=4))


def test_no_more_is_read_than_needed():
    def endless():
        while True:
            yield "abcdefgh"

    assert windows(endless(), length=4, count=3).shape == (3, 4)


def test_a_tokenizer_of_transformers_adds_nothing():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (batch,) = token_batches(["a b", "b a"], tokenizer, length=4)
    assert batch["input_ids"].tolist() == [[1, 2, 2, 1]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/file", "cannot be read"),
        (3, "type int"),
        ([3], "type int"),
        ([{"body": "x"}], "columns"),
        ([], "0 tokens"),
        (["ab"], "2 tokens"),
    ],
    ids=str,
)
def test_sources_that_hold_no_window_are_refused(source, message):
    with pytest.raises(ConversionError, match=message):
        list(token_batches(source, bytewise, length=8))


@pytest.mark.parametrize(
    "options", [{"length": 1}, {"count": 0}, {"batch_size": 0}, {"length": 2.0}], ids=str
)
def test_sizes_are_checked(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        token_batches(["abc"], bytewise, **options)
