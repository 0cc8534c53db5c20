"""Chat templates: messages become the tokens that a model was trained to answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dbf_compile.errors import ConversionError, OptionError

Message = Mapping[str, str]
# Takes the place of transformers' function of that name within a template.
_FIXED_DAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
_PRIVATE_USE = range(0xE000, 0xF900)


def check_has_template(tokenizer: Any, model: object) -> None:
    """Refuse a tokenizer without a chat template.

    Args:
        tokenizer: of transformers.
        model: its name, for the message.

    Raises:
        ConversionError: there is none, or there are several and none is the default.
    """
    try:
        tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        raise ConversionError(
            f"a chat with {model}, whose tokenizer has no chat template",
            "a model that was trained to follow instructions, with its chat template in the folder",
            "let it continue a text: dbf-compile generate, or dbf_compile.generate",
        ) from error


def prompt_of(tokenizer: Any, messages: Sequence[Message], settings: Mapping[str, Any]) -> Tensor:
    """Return the tokens of a conversation up to where the model's answer begins, int64 [1, T].

    A message is text: where a control token is written out in it, it is read as the letters that it consists of. So are other
    tokens that a tokenizer adds to its vocabulary, such as ``<think>``, but in answers, which the model has written itself.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: "role" and "content" of each, the oldest first.
        settings: further variables of the template, such as ``enable_thinking``.

    Raises:
        OptionError: the template refuses the messages, or leaves one out.
    """
    mark = _unused_character(
        [str(tokenizer.get_chat_template()), *(message["content"] for message in messages)]
    )
    marked = [
        {**message, "content": _cut(message["content"], _controls(tokenizer, message["role"]), mark)}
        for message in messages
    ]
    ids: list[int] = []
    for piece in _rendered(tokenizer, marked, settings).split(mark):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the control token that the template writes after an answer, or None where it writes none."""
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}],
            tokenize=False,
        )
    except Exception:  # a template may run any code, and has its own view of what a conversation is
        return None
    controls = set(_controls(tokenizer, "assistant"))
    tail = str(rendered).rpartition("answer")[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if tokenizer.decode([token]) in controls), None)


def before_messages(tokenizer: Any, turns: int) -> list[list[int]] | None:
    """Return what the template writes before every message of a conversation, as tokens; None without a template for one.

    The first piece begins the conversation and the user's message, the second ends that and begins the answer, and so on.

    Args:
        tokenizer: of transformers.
        turns: questions, each with its answer.
    """
    mark = chr(_PRIVATE_USE[0])
    messages = [{"role": role, "content": mark} for _ in range(turns) for role in ("user", "assistant")]
    try:
        text = rendered(tokenizer, messages)
    except Exception:  # as above
        return None
    pieces = text.split(mark)[:-1]
    if len(pieces) != len(messages):
        return None
    return [list(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a conversation as text, the same every day: a date that a template writes is a fixed one.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: of the conversation.
    """
    settings: dict[str, Any] = {}
    if "strftime_now" in str(getattr(tokenizer, "chat_template", "")):
        settings = {"chat_template": _FIXED_DAY + str(tokenizer.get_chat_template())}
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
    return text


def _rendered(tokenizer: Any, messages: list[dict[str, str]], settings: Mapping[str, Any]) -> str:
    """Return a conversation as text. Templates of models that also read pictures may take contents as lists of parts."""
    parts = [{**item, "content": [{"type": "text", "text": item["content"]}]} for item in messages]
    # Templates may shorten answers, and change spaces around a text.
    needed = [
        item for index, item in enumerate(messages) if item["role"] == "system" or index == len(messages) - 1
    ]
    problem, cause = "", None
    for form in (messages, parts):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True, **settings)
        except Exception as error:  # as above
            problem, cause = problem or str(error), cause or error
            continue
        lost = [item["role"] for item in needed if item["content"].strip() not in text]
        if not lost:
            return str(text)
        problem = problem or f"it leaves out the message of {lost[0]}"
    raise OptionError(
        f"messages that the chat template of the model does not take ({problem})",
        "what the model was trained with: some take no system message",
        "leave out what the template does not know, or write the prompt yourself for dbf-compile generate",
    ) from cause


def _controls(tokenizer: Any, role: str) -> list[str]:
    """Return the tokens that must not be read as such in a message, as they are written."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special or role != "assistant"})


def _cut(text: str, controls: list[str], mark: str) -> str:
    """Return a text with a mark after the first character of everything that is written like a control token."""
    pattern = "|".join(re.escape(token) for token in controls if len(token) > 1)
    if not pattern:
        return text
    starts = [match.start() + 1 for match in re.finditer(f"(?={pattern})", text)]
    bounds = zip([0, *starts], [*starts, len(text)], strict=True)
    return mark.join(text[start:end] for start, end in bounds)


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*texts)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
