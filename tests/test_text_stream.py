"""Text from tokens: pieces are whole characters, join to the text, and never have a stop string or its beginning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, tokens, skip_special_tokens=False):
        return bytes(tokens).decode("utf-8", errors="replace")


def run(text, stop=()):
    pieces = []
    stream = TextStream(Bytes(), stop, pieces.append)
    for token in text.encode():
        if stream.put(token):
            break
    return stream.end(), pieces


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_are_whole_characters(text):
    whole, pieces = run(text)
    assert whole == text == "".join(pieces)
    assert all("�" not in piece for piece in pieces) or "�" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stop):
    ends = [text.find(item) for item in stop if item in text]
    whole, pieces = run(text, stop)
    assert whole == "".join(pieces)
    if not ends:
        assert whole == text
        return
    # Of several, the one that is complete first ends the text.
    assert text.startswith(whole) and not any(item in whole for item in stop)
    assert any(text[len(whole) :].startswith(item) for item in stop)


def test_a_piece_is_passed_on_as_soon_as_no_stop_string_can_begin_in_it():
    pieces = []
    stream = TextStream(Bytes(), ["END"], pieces.append)
    for token in b"go EN":
        stream.put(token)
    assert "".join(pieces) == "go "
    stream.put(ord("x"))
    assert "".join(pieces) == "go ENx"


def test_bytes_that_are_no_character_do_not_hold_the_text_back():
    stream = TextStream(Bytes())
    for _ in range(20):
        stream.put(0xFF)
    assert stream.end() == "�" * 20


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_without_a_tokenizer_there_are_tokens_alone(stop):
    stream = TextStream(None, stop)
    assert not stream.put(7)
    assert stream.tokens == [7] and stream.end() == ""
