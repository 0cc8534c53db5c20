"""What texts begin with: kinds in turns, the tokenizer's own beginning, the same for the same seed."""

from itertools import islice
from typing import Any

import pytest

pytest.importorskip("transformers")

from support.models.pretrained import tiny_tokenizer

from dbf_compile.calibration.openings import Openings
from dbf_compile.errors import ConversionError
from dbf_compile.integrations.chat_templates import before_messages, rendered

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{{ strftime_now('%Y-%m-%d') }}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def begun(openings: Openings, row: int, count: int = 3) -> list[list[list[int]]]:
    return list(islice(openings.texts_of(row), count))


def test_without_a_tokenizer_texts_begin_with_any_token_but_the_barred() -> None:
    openings = Openings.of(None, 6, [0, 3], seed=0)
    texts = [text for row in range(20) for text in begun(openings, row)]
    assert {token for text in texts for piece in text for token in piece} == {1, 2, 4, 5}
    assert all(len(text) == 1 and len(text[0]) == 1 for text in texts)


def test_kinds_take_turns_and_conversations_have_three(tokenizer: Any, monkeypatch: Any) -> None:
    plain = [Openings.of(tokenizer, 256, [], 0).kind_of(row) for row in range(5)]
    assert plain == ["free", "encyclopedia", "web", "stories", "code"]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    openings = Openings.of(tokenizer, 256, [], 0)
    kinds = [openings.kind_of(row) for row in range(8)]
    assert kinds.count("dialogues") == 3 and set(kinds) == {*plain, "dialogues"}
    (pieces, *_) = begun(openings, 0)
    assert len(pieces) == 4


class Silent:
    """A tokenizer that knows none of our letters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": []}


def test_what_begins_with_nothing_is_left_out(tokenizer: Any, monkeypatch: Any) -> None:
    openings = Openings.of(Silent(), 8, [], 0)
    assert {openings.kind_of(row) for row in range(9)} == {"free"}
    for template in ("{% for m in messages %}{{ m.content }}|{% endfor %}", TEMPLATE + "é"):
        monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
        openings = Openings.of(tokenizer, 256, [], 0)
        assert ("dialogues" in {openings.kind_of(row) for row in range(8)}) == (TEMPLATE in template)
        assert all(text[0] for row in range(8) for text in begun(openings, row))


def test_a_template_with_marks_that_the_model_does_not_know_makes_no_conversation(monkeypatch: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<user>"])
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    assert Openings.of(tokenizer, 256, [], 0).conversation == ()
    assert Openings.of(tokenizer, 257, [], 0).conversation


def test_the_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConversionError, match=r"a tokenizer with a token of id .* to 63"):
        Openings.of(tokenizer, 64, [], 0)


def test_equal_seeds_begin_alike(tokenizer: Any) -> None:
    first, again, other = (Openings.of(tokenizer, 256, [], seed) for seed in (0, 0, 1))
    rows = range(10)
    assert [begun(first, row) for row in rows] == [begun(again, row) for row in rows]
    assert [begun(first, row) for row in rows] != [begun(other, row) for row in rows]
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_what_stands_before_messages_is_the_template_without_them(tokenizer: Any, monkeypatch: Any) -> None:
    assert before_messages(tokenizer, 2) is None  # no template
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    pieces = before_messages(tokenizer, 2)
    assert pieces is not None and len(pieces) == 4
    whole = tokenizer("</s><assistant>", add_special_tokens=False)["input_ids"]
    assert pieces[1] == pieces[3] == whole
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%Y') }}" + TEMPLATE, raising=False)
    assert rendered(tokenizer, [{"role": "user", "content": "a"}]) == "26 Jul 2024<user>a</s>26 Jul 2024"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}", raising=False)
    assert before_messages(tokenizer, 2) is None  # a template that leaves messages out
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}", raising=False)
    assert before_messages(tokenizer, 2) is None
