"""What the text begins with that a model writes itself: words of several kinds of text, and turns of a conversation.

| kind | it begins with |
|---|---|
| free | one token, drawn from the vocabulary: the model says what it will be |
| dialogues | what the chat template writes before the user's first message: the model writes question and answer |
| encyclopedia, web, stories, code | a few words |

Where a text has come to an end, another of the kind begins behind it, so that windows are full. Rows take the kinds in turns.

Source: a first token at random as in Liu et al. (arXiv 2305.17888); questions that the model writes itself behind an empty
template as in Xu et al. (arXiv 2406.08464).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dbf_compile.calibration.batches import start_of
from dbf_compile.errors import ConversionError
from dbf_compile.integrations.chat_templates import before_messages

FREE, DIALOGUES = "free", "dialogues"
# The kind of one row after the other. What a model was trained to do last, it is to keep: answering takes more than its turn.
_ORDER = (DIALOGUES, FREE, "encyclopedia", DIALOGUES, "web", "stories", DIALOGUES, "code")
_TURNS = 2  # questions of a conversation
_WORDS = {
    "encyclopedia": (
        "The history of",
        "= Geography =\n\nThe region",
        "In mathematics, a",
        "The city of",
        "The species is found in",
        "During the Second World War,",
        "Physics is",
        "The river rises",
    ),
    "web": (
        "How to",
        "Posted on Monday by",
        "5 reasons why",
        "Welcome to our",
        "Q: What is the best way to",
        "We are looking for",
        "Breaking news:",
        "Ingredients:\n",
    ),
    "stories": (
        "Once upon a time",
        "Chapter 1\n\n",
        '"I have never seen',
        "It was a cold night, and",
        "ACT I\n\nSCENE I.",
        "She opened the door",
        "My dear friend,\n\n",
        "The old man",
    ),
    "code": (
        "import ",
        "def ",
        "#include <stdio.h>\n\nint ",
        "class ",
        "function ",
        "<!DOCTYPE html>\n<html>\n",
        "SELECT ",
        "public class ",
    ),
}


@dataclass(frozen=True)
class Openings:
    """Beginnings of texts, as tokens.

    Args:
        start: ids that the tokenizer puts in front of a text.
        words: of every kind that begins with words, the ids of its beginnings.
        conversation: ids before every message of a conversation; none without a chat template.
        plain: ids that a text may begin with.
        seed: of the tokens that are drawn, and of the order of beginnings.
    """

    start: tuple[int, ...]
    words: Mapping[str, tuple[tuple[int, ...], ...]]
    conversation: tuple[tuple[int, ...], ...]
    plain: tuple[int, ...]
    seed: int

    @staticmethod
    def of(tokenizer: Any, vocabulary: int, barred: Sequence[int], seed: int) -> Openings:
        """Return the beginnings for a model.

        Args:
            tokenizer: of the model; None for one that is not at hand: then all texts are free.
            vocabulary: the ids of the model are below it.
            barred: ids that no text has, such as those that stand for a picture.
            seed: as above.

        Raises:
            ConversionError: the tokenizer has words that the model does not know.
        """
        special = {*barred, *getattr(tokenizer, "all_special_ids", ())}
        plain = tuple(token for token in range(vocabulary) if token not in special) or (0,)
        if tokenizer is None:
            return Openings((), {}, (), plain, seed)
        start = tuple(start_of(tokenizer))
        texts = {kind: [_ids(tokenizer, text) for text in texts] for kind, texts in _WORDS.items()}
        _check_known(vocabulary, (start, *chain.from_iterable(texts.values())))
        # Of letters that it does not know a tokenizer may make nothing.
        words = {kind: tuple(filter(None, ids)) for kind, ids in texts.items() if any(ids)}
        conversation = before_messages(tokenizer, _TURNS) or [[]]
        if not conversation[0] or max(chain.from_iterable(conversation)) >= vocabulary:
            conversation = []  # it begins with nothing, or with marks that the model was not trained with
        return Openings(start, words, tuple(map(tuple, conversation)), plain, seed)

    def texts_of(self, row: int) -> Iterator[list[list[int]]]:
        """Yield beginnings of the texts of a row, without end: each the ids it begins with, then those of further turns."""
        generator = torch.Generator().manual_seed(self._seed_of(row))
        kind = self.kind_of(row)
        choices = self.words.get(kind, self.plain)
        while True:
            drawn = choices[int(torch.randint(len(choices), (), generator=generator))]
            if kind == DIALOGUES:
                yield [list(ids) for ids in self.conversation]
            else:
                yield [[*self.start, *(drawn if isinstance(drawn, tuple) else (drawn,))]]

    def kind_of(self, row: int) -> str:
        """Return the kind of text that a row has."""
        present = {FREE, *self.words, *([DIALOGUES] if self.conversation else [])}
        kinds = [kind for kind in _ORDER if kind in present]
        return kinds[row % len(kinds)]

    def fingerprint(self) -> str:
        """Return a hash of all that the beginnings depend on."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def _seed_of(self, row: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed} {row}".encode()).digest()[:7])


def _check_known(vocabulary: int, texts: Iterable[Sequence[int]]) -> None:
    largest = max(chain([0], *texts))
    if largest >= vocabulary:
        raise ConversionError(
            f"a tokenizer with a token of id {largest}",
            f"0 to {vocabulary - 1}, the model's vocabulary",
            "use the tokenizer of this model; own_text=0 leaves out what the model writes itself",
        )


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
