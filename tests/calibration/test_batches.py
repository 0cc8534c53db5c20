"""Batches: windows of consecutive tokens from files, texts and rows."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.models.tiny import tiny_llama

from dbf_compile.calibration import readers
from dbf_compile.calibration.batches import token_batches, windows_for
from dbf_compile.calibration.sources import are_paths
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.options import CompressOptions, EvaluationConfig


def bytewise(text):
    """A tokenizer as simple as can be: one token a byte."""
    return {"input_ids": list(text.encode())}


def windows(source, **options):
    batches = list(token_batches(source, bytewise, **options))
    return torch.cat([batch["input_ids"] for batch in batches])


@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=6),
    st.integers(2, 20),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_windows_are_the_text_in_order(texts, length, count, batch_size):
    assume(not are_paths(texts))  # "0.json" alone names a file
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


def words(template):
    """Return a tokenizer of words that puts special tokens around a text as ``template`` says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ("<s>", "</s>", "<x>")
    vocabulary = {word: index for index, word in enumerate([*specials, "a", "b", "?"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    known = [(name, vocabulary[name]) for name in specials]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "start"),
    [("$A", []), ("<s> $A", [0]), ("$A </s>", []), ("<s> $A </s>", [0]), ("<x> <s> $A", [2, 0])],
)
def test_every_window_begins_as_the_tokenizer_begins_a_text(template, start):
    pytest.importorskip("transformers")
    texts = ["a b b", "b a a b a b a a"]
    ids = [3, 4, 4, 4, 3, 3, 4, 3, 4, 3, 3]
    batches = token_batches(texts, words(template), length=5)
    step = 5 - len(start)
    expected = [start + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    assert [batch["input_ids"][0].tolist() for batch in batches] == expected


def test_a_text_that_brings_its_own_beginning_gets_no_second_one():
    pytest.importorskip("transformers")
    batches = token_batches(["<s>a b a b a b"], words("<s> $A"), length=4)
    assert [batch["input_ids"][0].tolist() for batch in batches] == [[0, 3, 4, 3], [0, 4, 3, 4]]
    with pytest.raises(OptionError, match="length=2; allowed: more than 2"):
        list(token_batches(["a b a b"], words("<x> <s> $A"), length=2))


def test_ids_are_taken_as_they_are_and_need_no_tokenizer():
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [6]}]
    (batch,) = token_batches(rows, None, length=3, batch_size=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ConversionError, match="text without a tokenizer"):
        list(token_batches(["text"], None, length=2))
    with pytest.raises(OptionError, match="tokenizer of type str"):
        token_batches(["text"], "gpt2", length=2)


def test_a_large_text_is_cut_where_nothing_is_lost(tmp_path, monkeypatch):
    text = "\n\n".join(f"paragraph {number} of a text" for number in range(60))
    (tmp_path / "text.txt").write_text(text)
    whole = windows(tmp_path / "text.txt", length=7, count=1000)
    monkeypatch.setattr(readers, "WHOLE", 200)
    monkeypatch.setattr(readers, "PIECE", 100)
    assert torch.equal(windows(tmp_path / "text.txt", length=7, count=1000), whole)


def test_windows_for_a_model_are_as_long_as_it_allows(caplog):
    pytest.importorskip("transformers")
    model = tiny_llama()
    model.config.max_position_embeddings = 12
    text = ["some words " * 50]
    usual = windows_for(model, text, bytewise, EvaluationConfig(progress=False), 16, 3)
    assert [batch["input_ids"].shape for batch in usual] == [(1, 12)] * 3
    assert "12 tokens instead of 16" in caplog.text
    with pytest.raises(OptionError, match="length=13 for a model of 12 positions"):
        windows_for(model, text, bytewise, CompressOptions(length=13, progress=False), 16, 3)
    with pytest.raises(ConversionError, match=r"token id of 300; .*tokenizer of this model"):
        windows_for(model, [[300] * 40], None, CompressOptions(length=8, progress=False), 16, 3)


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
