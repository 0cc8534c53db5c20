"""Rows of data and the documents in them: texts, conversations, ids of tokens.

| a row has | it is read as |
|---|---|
| the column that was asked for | what stands there: a text, a conversation, ids |
| ``text`` | a text |
| ``messages``, ``conversations`` or ``conversation`` | a conversation, through the chat template of the tokenizer |
| ``prompt`` and ``completion``, ``instruction`` and ``output``, … | a conversation of two turns; a text without a template |
| ``input_ids`` | ids, as they are; those that an ``attention_mask`` leaves out are no part of it |

The first that fits counts. A row where it is missing (None, NaN or an empty list) is passed over; any other row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dbf_compile.errors import ConversionError
from dbf_compile.integrations.chat_templates import rendered

SEPARATOR = "\n\n"  # between documents, as usual in evaluations of perplexity
_CHATS = ("messages", "conversations", "conversation")
# Columns of a question, of what belongs to it, and of its answer; what joins them where there is no chat template.
_PAIRS = (
    ("prompt", "", "completion", ""),
    ("prompt", "", "response", SEPARATOR),
    ("prompt", "", "chosen", SEPARATOR),
    ("instruction", "input", "output", SEPARATOR),
    ("instruction", "context", "response", SEPARATOR),
    ("question", "", "answer", SEPARATOR),
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KNOWN = "text, messages, conversations, prompt and completion, instruction and output, or input_ids"


class Document(NamedTuple):
    """A text or ids, and the text between it and what stands before."""

    content: str | list[int]
    joint: str = SEPARATOR


def document_of(item: Any, tokenizer: Any, column: str | None) -> Document | None:
    """Return the document in an item of data, or None for a row that has none.

    Args:
        item: a text, a row, a conversation (a list of messages), or ids (a list, or a tensor or array of whole numbers).
        tokenizer: its chat template renders conversations.
        column: of the row; None for the first that the table above names.

    Raises:
        ConversionError: something else, or a conversation without a chat template.
    """
    if isinstance(item, Document):
        return item
    if isinstance(item, Mapping):
        return _document_of_row(item, tokenizer, column)
    document = _content(item, tokenizer)
    if document is None:
        advice = "pass ready batches as batches" if isinstance(item, tuple) else "pass texts, or rows"
        raise ConversionError(
            f"an item of type {type(item).__name__}", "a text, a row, a list of messages, or ids", advice
        )
    return document


def table_of(mapping: Mapping[str, Any], column: str | None, split: str | None) -> Any:
    """Return the rows that a mapping stands for: itself, its columns, the table in it, or the split of that name.

    Raises:
        ConversionError: several splits and none asked for, or not that one.
    """
    names = _columns_of(mapping, column)
    if names:
        refuse_split(split)
        first = _plain(mapping[names[0]])
        if not isinstance(first, Mapping) and (isinstance(first, str) or not _holds_many(first)):
            return [mapping]
        columns = {
            name: list(values.values()) if isinstance(values, Mapping) else _plain(values)
            for name, values in mapping.items()
            if _is_table(values) or isinstance(values, Mapping)
        }
        return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    tables = {str(name): table for name, table in mapping.items() if _is_table(table)}
    if not tables:
        refuse_split(split)
        return [mapping]
    if split is None:
        split = next((name for name in ("data", "rows") if name in tables), None)
        split = next(iter(tables)) if split is None and len(tables) == 1 else split
    if split not in tables:
        asked = "" if split is None else f", without {split!r}"
        raise ConversionError(
            f"data with the splits {', '.join(map(repr, tables))}{asked}",
            "one of them",
            f"pass split={next(iter(tables))!r}",
        )
    return tables[split]


def refuse_split(split: str | None) -> None:
    """Refuse a split that was asked of data without any."""
    if split is not None:
        raise ConversionError(f"split={split!r} of data without splits", "no split", "leave split out")


def _columns_of(row: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    """Return the columns of the document: one, or those of a question, of what belongs to it, and of its answer."""
    if column is not None:
        return (column,) if column in row else ()
    for name in ("text", *_CHATS):
        if name in row and not _is_missing(row[name]):
            return (name,)
    for question, more, answer, joint in _PAIRS:
        if question in row and answer in row:
            return (question, more, answer, joint)
    return next(((name,) for name in ("input_ids", "text", *_CHATS) if name in row), ())


def _document_of_row(row: Mapping[str, Any], tokenizer: Any, column: str | None) -> Document | None:
    names = _columns_of(row, column)
    if not names:
        raise ConversionError(
            f"a row with the columns {', '.join(map(repr, row)) or 'none'}",
            _KNOWN if column is None else f"a column {column!r}",
            "pass column=... to name that of the texts",
        )
    if len(names) > 1:
        return _pair(row, names, tokenizer)
    name = names[0]
    value = _plain(row[name])
    if _is_missing(value):
        return None
    if name in _CHATS and isinstance(value, str):
        value = _parsed(value)
    document = _content(value, tokenizer)
    if document is None:
        raise ConversionError(
            f"column {name!r} of type {type(value).__name__}",
            "texts, lists of messages, or ids",
            "pass column=...",
        )
    mask = _plain(row.get("attention_mask"))
    if isinstance(document.content, list) and isinstance(mask, Sequence):
        kept = [one for one, real in zip(document.content, _flat(mask), strict=False) if real]
        return Document(kept, document.joint)
    return document


def _content(value: Any, tokenizer: Any) -> Document | None:
    """Return a text, a conversation or ids as a document; None for anything else."""
    value = _plain(value)
    if isinstance(value, str):
        return Document(value)
    if not isinstance(value, list):
        return None
    if value and all(isinstance(message, Mapping) for message in value):
        return Document(_rendered(value, tokenizer), "")
    ids = _flat(value)
    if ids and all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        return Document(ids, "")
    return None


def _pair(row: Mapping[str, Any], names: tuple[str, ...], tokenizer: Any) -> Document | None:
    question, more, answer, joint = names
    prompt, reply, context = _plain(row[question]), _plain(row[answer]), row.get(more)
    if _is_missing(prompt) or _is_missing(reply):
        return None
    if isinstance(prompt, str) and isinstance(context, str) and context:
        prompt += SEPARATOR + context
    if (
        isinstance(prompt, str)
        and isinstance(reply, str)
        and getattr(tokenizer, "chat_template", None) is None
    ):
        return Document(prompt + joint + reply)
    asked, answered = _messages(prompt, "user"), _messages(reply, "assistant")
    whole = answered[: len(asked)] == asked  # the reply is the conversation from its beginning
    return Document(_rendered(answered if whole else asked + answered, tokenizer), "")


def _messages(turn: Any, role: str) -> list[Any]:
    """Return a turn as messages: those that it is, or one with its text."""
    return turn if isinstance(turn, list) else [{"role": role, "content": str(turn)}]


def _rendered(messages: Iterable[Mapping[str, Any]], tokenizer: Any) -> str:
    """Return a conversation as its model was trained to read it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConversionError(
            "conversations for a tokenizer without a chat template",
            "a tokenizer with chat_template, or rows of texts",
            "set tokenizer.chat_template, or pass column=... to name a column of texts",
        )
    try:
        text = rendered(tokenizer, [_message(one) for one in messages])
    except Exception as error:  # whatever a template raises
        raise ConversionError(
            f"a conversation that the chat template does not take ({error})",
            "messages with role and content, in the order that the template asks for",
            "change the rows, or set tokenizer.chat_template",
        ) from error
    return text


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with ``role`` and ``content``; others say ``from`` and ``value``."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise ConversionError(
            f"a message with {', '.join(map(repr, message)) or 'nothing'}",
            "role and content, or from and value",
            "change the rows, or pass column=...",
        )
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(parts) < len(content) or not all(isinstance(part, str) for part in parts):
            raise ConversionError(
                "a message with parts that are no text",
                "text alone",
                "pass batches=... for pictures and sounds",
            )
        content = "".join(map(str, parts))
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**rest, "role": _ROLES.get(role, role), "content": content}


def _parsed(text: str) -> Any:
    """Return a conversation that a table holds as JSON; any other text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def _plain(value: Any) -> Any:
    """Return a tensor, an array or a tuple as a list, and anything else as it is."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _flat(values: Sequence[Any]) -> list[Any]:
    """Return ids [T], or [batch, T] one row after the other, as one list."""
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or (isinstance(value, list) and not value)
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _holds_many(values: Any) -> bool:
    """Return whether a column's values are many documents: texts, conversations, or rows of ids."""
    first = next(iter(values), None) if _is_table(values) else None
    return isinstance(first, (str, list, tuple)) or hasattr(first, "tolist")
