"""Text that a model writes itself, many windows at a time: what it says now, it is to say when it is compressed.

    token_t ~ softmax(logits(token_1 … token_{t−1}) / temperature),  of the top_k likeliest

No window is padded. The tokens that its text begins with are forced on a row one by one, as if it had drawn them; where it ends a
text, the beginning of the next follows. So all rows are equally long at any time, and a step is one token of each: over our own
cache where a model fits it (:mod:`dbf_compile.integrations.steps`), else within ``generate`` of transformers.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dbf_compile.attention_ops import empty_cache
from dbf_compile.calibration.limits import Limits, embedded_ids
from dbf_compile.calibration.model_io import is_causal, reads_tokens
from dbf_compile.calibration.openings import Openings
from dbf_compile.errors import ConversionError, WeightError
from dbf_compile.integrations import steps
from dbf_compile.integrations.generation_settings import UnsuitedError
from dbf_compile.options import Sampling
from dbf_compile.sampling import Sampler

# Tokens of a text at least. Behind a word at random a model of instructions often sees nothing to say.
_SHORTEST = 32


def writes(model: Any) -> bool:
    """Return whether a model writes text: it predicts every token from those before it."""
    return bool(is_causal(model) and reads_tokens(model) and embedded_ids(model))


def check_writes(model: Any) -> None:
    """Refuse a model that writes no text of its own.

    Raises:
        ConversionError: it does not predict every token from those before it.
    """
    if not writes(model):
        raise ConversionError(
            f"text that {type(model).__name__} is to write itself",
            "a causal language model: one that predicts every token from those before it",
            "pass data='text.txt', or batches of what the model reads",
        )


@dataclass(frozen=True)
class Writer:
    """A model that writes windows of text; equal writers write equal windows.

    Args:
        model: a causal language model, in evaluation mode.
        openings: what texts begin with.
        length: tokens of a window, 2 or more.
        vocabulary: ids that are drawn are below it: those that the model reads and the tokenizer has a text for.
        sampling: how tokens are drawn.
        ends: tokens that end a text, or a turn of a conversation.
        barred: ids that are never drawn.
    """

    model: Any
    openings: Openings
    length: int
    vocabulary: int
    sampling: Sampling
    ends: frozenset[int]
    barred: tuple[int, ...]

    @staticmethod
    def of(model: Any, tokenizer: Any, length: int, sampling: Sampling) -> Writer:
        """Return a writer.

        Args:
            model, length: as above.
            tokenizer: of the model, or None: then texts begin with a token at random.
            sampling: with a seed.

        Raises:
            ConversionError: the model writes no text, or the tokenizer is that of another one.
        """
        check_writes(model)
        read = embedded_ids(model) or 1
        vocabulary = min(read, _known(tokenizer) or read)
        placeholders = Limits.of(model).placeholders  # which may lie behind the vocabulary, as may ends
        barred = tuple(sorted(token for token in placeholders if token < vocabulary))
        seed = sampling.seed or 0
        # Texts of one seed are to be others than those of the next one, whose rows would draw alike.
        drawing = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:7])
        openings = Openings.of(tokenizer, read, (*barred, *range(vocabulary, read)), seed)
        sampling = replace(sampling, do_sample=True, seed=drawing)
        ends = frozenset(token for token in _end_tokens(model, tokenizer) if 0 <= token < vocabulary)
        return Writer(model, openings, length, vocabulary, sampling, ends, barred)

    def fingerprint(self) -> str:
        """Return a hash of all that the text depends on but the model."""
        drawn = (self.vocabulary, self.sampling, sorted(self.ends), self.barred)
        return hashlib.sha256(repr((self.openings.fingerprint(), self.length, drawn)).encode()).hexdigest()

    @torch.no_grad()
    def write(self, rows: range, advance: Callable[[int], object] = lambda tokens: None) -> Tensor:
        """Return windows, int64 [rows, length], on the CPU.

        Args:
            rows: numbers of the windows, one after the other.
            advance: called after every step with the number of its tokens.

        Raises:
            WeightError: the model's logits are no numbers.
        """
        chooser = _Chooser(self, rows, advance)
        try:
            sizes = steps.probe(self.model)
        except UnsuitedError:
            steps.generate_by(self.model, chooser.last, self.length - 1, chooser.choose)
        else:
            self._by_steps(chooser, len(rows), sizes)
        return torch.tensor(chooser.tokens)

    def _by_steps(
        self, chooser: _Chooser, rows: int, sizes: Sequence[tuple[int, int, int, torch.dtype]]
    ) -> None:
        keys, values = empty_cache(sizes, rows, self.length, self.model.device)
        last = torch.tensor([0])
        with steps.our_attention(self.model):
            for position in range(self.length - 1):
                positions = torch.full((rows, 1), position)
                chooser.choose(steps.step(self.model, chooser.last, positions, last, keys, values))


class _Chooser:
    """Chooses the next token of every row, and keeps what was chosen."""

    def __init__(self, writer: Writer, rows: range, advance: Callable[[int], object]) -> None:
        self._rows = [_Row(writer.openings.texts_of(row), writer.ends) for row in rows]
        seed = (writer.sampling.seed or 0) + rows.start
        # Drawn on the CPU, so that all devices draw alike; of the likeliest, which the device finds.
        self._sampler = Sampler(replace(writer.sampling, seed=seed, top_k=0), len(rows), torch.device("cpu"))
        self._top_k, self._vocabulary = writer.sampling.top_k or None, writer.vocabulary
        self._barred, self._ends = (
            torch.tensor(sorted(ids), dtype=torch.int64) for ids in (writer.barred, writer.ends)
        )
        self._advance = advance
        advance(len(rows))

    @property
    def tokens(self) -> list[list[int]]:
        """The windows as far as they are."""
        return [row.tokens for row in self._rows]

    @property
    def last(self) -> Tensor:
        """The last token of every row, int64 [rows, 1], on the CPU."""
        return torch.tensor([[row.tokens[-1]] for row in self._rows])

    def choose(self, logits: Tensor) -> Tensor:
        """Add a token to every row, for logits [rows, vocabulary]; return them, int64 [rows, 1], on the CPU."""
        device = logits.device
        logits = logits[:, : self._vocabulary].float().index_fill(1, self._barred.to(device), -torch.inf)
        ends, young = self._ends.to(device), torch.tensor([row.is_young for row in self._rows])
        logits[:, ends] = logits[:, ends].masked_fill(young[:, None].to(device), -torch.inf)
        if not bool(logits.amax(1).isfinite().all()):
            raise WeightError(
                "text that a model is to write itself, of logits that are NaN or infinite",
                "a model whose outputs are finite",
                "check the model: does it answer in this dtype?",
            )
        scores, tokens = logits.topk(min(self._top_k or logits.shape[1], logits.shape[1]))
        drawn = tokens.cpu().gather(1, self._sampler.choose(scores.cpu(), [])[:, None])
        for row, token in zip(self._rows, drawn[:, 0].tolist(), strict=True):
            row.put(token)
        self._advance(len(self._rows))
        return self.last


class _Row:
    """A window on its way: texts one after the other, each of pieces that are forced and of what the model writes between."""

    def __init__(self, texts: Iterator[list[list[int]]], ends: frozenset[int]) -> None:
        self._texts, self._ends = texts, ends
        self._pieces: deque[list[int]] = deque()
        self._forced: deque[int] = deque()
        self.tokens: list[int] = []
        self._begin()
        self.tokens.append(self._forced.popleft())

    def put(self, drawn: int) -> None:
        """Add the next token: one that is forced, else the one that the model has drawn."""
        if self._forced:
            self.tokens.append(self._forced.popleft())
            return
        self.tokens.append(drawn)
        is_end = drawn in self._ends
        if self._pieces and (is_end or self._pieces[0][:1] == [drawn]):
            piece = self._pieces.popleft()
            self._forced.extend(piece[piece.index(drawn) + 1 :] if drawn in piece else piece)
        elif is_end:
            self._begin()

    @property
    def is_young(self) -> bool:
        """Whether the text, which is no turn of a conversation, is too short to end."""
        return not self._is_conversation and len(self.tokens) - self._began < _SHORTEST

    def _begin(self) -> None:
        self._pieces.extend(next(self._texts))
        self._is_conversation, self._began = len(self._pieces) > 1, len(self.tokens)
        self._forced.extend(self._pieces.popleft())


def _known(tokenizer: Any) -> int | None:
    """Return how many ids a tokenizer has texts for; None where it does not say."""
    try:
        return max(tokenizer.get_vocab().values(), default=-1) + 1
    except (AttributeError, NotImplementedError):
        return None


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        token = getattr(source, "eos_token_id", None)
        several = token if isinstance(token, (list, tuple)) else [token]
        ends |= {int(one) for one in several if one is not None}
    return frozenset(ends)
