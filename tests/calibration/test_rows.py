"""Rows: what they hold is read as what it is, or refused with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dbf_compile.calibration.rows import Document, document_of, table_of
from dbf_compile.errors import ConversionError


class Chat:
    """A tokenizer of which only the chat template is asked for."""

    chat_template = "role:content"

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        assert not tokenize
        return "|".join(f"{one['role']}:{one['content']}" for one in messages)


def read(item: Any, column: str | None = None, tokenizer: Any = None) -> Any:
    document = document_of(item, tokenizer, column)
    return document and document.content


QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("item", "content"),
    [
        ("some text", "some text"),
        ("", ""),
        (Document("piece", "\n"), "piece"),
        ({"text": "x", "n": 1}, "x"),
        ({"text": "x", "messages": [QUESTION]}, "x"),
        ({"text": None, "input_ids": [1, 2]}, [1, 2]),
        ({"text": None}, None),
        ({"text": float("nan"), "n": 1}, None),
        ({"messages": []}, None),
        ([1, 2, 3], [1, 2, 3]),
        (torch.arange(3), [0, 1, 2]),
        (torch.arange(3).numpy(), [0, 1, 2]),
        ({"input_ids": torch.arange(3)[None]}, [0, 1, 2]),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, [5, 6]),
        ({"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.tensor([[0, 1]])}, [5]),
        ({"prompt": "a", "completion": " b"}, "a b"),
        ({"prompt": "a", "completion": None}, None),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb\n\nc"),
        ({"instruction": "a", "input": "", "output": "c"}, "a\n\nc"),
        ({"question": "a", "answer": "b"}, "a\n\nb"),
    ],
)  # fmt: skip
def test_a_row_without_a_conversation_needs_no_template(item: Any, content: Any) -> None:
    assert read(item) == content


@pytest.mark.parametrize(
    "item",
    [
        [QUESTION, ANSWER],
        {"messages": [QUESTION, ANSWER]},
        {"messages": (QUESTION, ANSWER), "prompt": "a", "completion": "c"},
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversation": [QUESTION, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "a", "chosen": [QUESTION, ANSWER], "rejected": []},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"instruction": "a", "input": "", "output": "b"},
        {"question": "a", "answer": "b"},
    ],
    ids=str,
)
def test_conversations_go_through_the_template(item: Any) -> None:
    assert read(item, tokenizer=Chat()) == "user:a|assistant:b"
    assert document_of(item, Chat(), None) == Document("user:a|assistant:b", "")  # templates end their turns


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"body": "x"}, r"columns 'body'.*pass column="),
        ({}, "columns none"),
        ({"text": 3}, "column 'text' of type int.*pass column="),
        ({"text": ["a", "b"]}, "column 'text' of type list"),
        (3, "item of type int"),
        (b"bytes", "item of type bytes"),
        (None, "item of type NoneType"),
        ((torch.arange(3), torch.arange(3)), "type tuple.*ready batches"),
        ([1.5, 2.5], "type list"),
        ([True, False], "type list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "without a chat template"),
    ],
    ids=str,
)
def test_what_is_no_document_is_refused_with_the_way_out(item: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read(item)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    class Strict(Chat):
        def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
            raise ValueError("roles must alternate")

    with pytest.raises(ConversionError, match="roles must alternate"):
        read([QUESTION, QUESTION], tokenizer=Strict())
    with pytest.raises(ConversionError, match="a message with 'speaker'"):
        read([{"speaker": "a"}], tokenizer=Chat())


def test_the_column_that_is_asked_for_is_read() -> None:
    assert read({"text": "x", "body": "y"}, "body") == "y"
    assert read({"ids": [1, 2]}, "ids") == [1, 2]
    assert read({"turns": [QUESTION]}, "turns", Chat()) == "user:a"
    with pytest.raises(ConversionError, match="columns 'text'; allowed: a column 'body'"):
        read({"text": "x"}, "body")


ROWS = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]


@pytest.mark.parametrize(
    ("mapping", "rows"),
    [
        (ROWS[0], [ROWS[0]]),
        ({"text": ["a", "b"], "n": [1, 2]}, ROWS),
        ({"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}, ROWS),  # as pandas writes JSON
        ({"messages": [QUESTION, ANSWER]}, [{"messages": [QUESTION, ANSWER]}]),
        ({"messages": [[QUESTION], [ANSWER]]}, [{"messages": [QUESTION]}, {"messages": [ANSWER]}]),
        ({"input_ids": [1, 2]}, [{"input_ids": [1, 2]}]),
        ({"input_ids": torch.eye(2).long()}, [{"input_ids": [1, 0]}, {"input_ids": [0, 1]}]),
        ({"data": ROWS, "version": "1"}, ROWS),
        ({"train": ROWS}, ROWS),
        ({"other": 3}, [{"other": 3}]),
    ],
    ids=str,
)
def test_a_mapping_is_a_row_or_columns_or_a_table(mapping: Any, rows: Any) -> None:
    assert list(table_of(mapping, None, None)) == rows


def test_of_several_splits_one_is_asked_for() -> None:
    splits = {"train": ROWS, "test": ROWS[:1]}
    assert table_of(splits, None, "test") == ROWS[:1]
    with pytest.raises(ConversionError, match=r"splits 'train', 'test'; .*pass split='train'"):
        table_of(splits, None, None)
    with pytest.raises(ConversionError, match="without 'dev'"):
        table_of(splits, None, "dev")
    for mapping in (ROWS[0], {"text": ["a"]}, {"other": 3}):
        with pytest.raises(ConversionError, match="data without splits"):
            table_of(mapping, None, "train")


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "text", "text": None}, "text"])
def test_parts_of_a_message_that_are_no_text_are_refused(part: Any) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, part]}
    with pytest.raises(ConversionError, match="parts that are no text"):
        read({"messages": [message, ANSWER]}, tokenizer=Chat())
