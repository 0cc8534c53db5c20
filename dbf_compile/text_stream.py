"""Text from tokens, one after the other: passed on as soon as it is final, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class TextStream:
    """Turns tokens into text.

    A piece is final when it ends with a whole character, and no stop string can begin in it. The pieces joined are ``text``.

    Args:
        tokenizer: its ``decode`` takes token ids; None for no text at all.
        stop: strings that end the text; it does not have them.
        stream: called with every piece.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), stream: Callable[[str], object] | None = None
    ) -> None:
        self._tokenizer, self._stop, self._stream = tokenizer, [item for item in stop if item], stream
        self._tokens: list[int] = []
        # Tokens [_start, _read) are a little context, whose text is out already: a tokenizer may write a token differently
        # at the start of a text.
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
        return self._tokens

    def put(self, token: int) -> bool:
        """Take a token; return whether a stop string has ended the text."""
        self._tokens.append(token)
        if self._tokenizer is None or self.stopped:
            return self.stopped
        piece = self._fresh()
        # The first bytes of a character decode to U+FFFD. No character has more than a few tokens.
        if piece.endswith("�") and len(self._tokens) - self._read < 8:
            return False
        self._start, self._read = self._read, len(self._tokens)
        self._take(piece)
        return self.stopped

    def end(self) -> str:
        """Pass on what is left, and return the whole text."""
        if self._tokenizer is not None and not self.stopped:
            self._take(self._fresh())
            self._start = self._read = len(self._tokens)
            if not self.stopped:
                self._pass_on(len(self._held))
        return self.text

    def _fresh(self) -> str:
        known = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _take(self, piece: str) -> None:
        self._held += piece
        ends = [index for item in self._stop if (index := self._held.find(item)) >= 0]
        if ends:
            self.stopped = True
            self._pass_on(min(ends))
        else:
            self._pass_on(len(self._held) - self._beginning_of_stop())

    def _beginning_of_stop(self) -> int:
        """Return the length of the longest end of the held text with which a stop string begins."""
        lengths = [
            length
            for item in self._stop
            for length in range(1, min(len(item), len(self._held) + 1))
            if self._held.endswith(item[:length])
        ]
        return max(lengths, default=0)

    def _pass_on(self, length: int) -> None:
        piece, self._held = self._held[:length], self._held[length:]
        if piece:
            self.text += piece
            if self._stream is not None:
                self._stream(piece)
