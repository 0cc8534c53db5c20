"""Batches of tokens: windows of files, data sets, rows and texts, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.limits import checked, embedded_ids, positions_of, window_length
from dbf_compile.calibration.model_io import vocabulary_of
from dbf_compile.calibration.sources import documents
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.options import CompressOptions, EvaluationConfig
from dbf_compile.progress import over

RANDOM_WINDOWS = 16


class NoWindowError(ConversionError):
    """A source holds less than one window."""


def token_batches(
    source: str | Path | Iterable[Any],
    tokenizer: Any,
    *,
    length: int = 512,
    count: int = 64,
    batch_size: int = 1,
    column: str | None = None,
    split: str | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of consecutive windows of tokens, without padding; equal arguments give equal batches.

    Documents are joined by blank lines and cut into windows. Each begins with what the tokenizer puts in front of a text,
    such as a token for the beginning (BOS), and not twice. Tokens after the last full window are dropped. The source is read
    no further than needed.

    Args:
        source: path of a file of text or of rows (:mod:`~dbf_compile.calibration.readers` names the kinds), a folder or a
            pattern of such files, a data set's name on the Hub (``name`` or ``name:configuration``), or a list of paths.
            Or texts, rows, conversations or ids (:mod:`~dbf_compile.calibration.rows` says which), as an iterable, a table,
            or an object of ``datasets``.
        tokenizer: of transformers, or any function with ``tokenizer(text)["input_ids"]`` a list of ids; it may be None
            where the source holds ids.
        length: tokens in a window, 2 or more.
        count: windows, at most; fewer where the source is short.
        batch_size: windows in a batch; the last batch may have fewer.
        column: name of the column to read; None for the first that is known.
        split: name of the split to read, where there are several.

    Yields:
        ``{"input_ids": int64 [batch, length]}``

    Raises:
        OptionError: a length, count or batch size is out of range, or the tokenizer is none.
        ConversionError: the source cannot be read, has another type, or holds less than one window.
    """
    for name, value, low in (("length", length, 2), ("count", count, 1), ("batch_size", batch_size, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise OptionError(f"{name}={value!r}", f"a whole number of {low} or more", f"leave {name} out")
    if tokenizer is not None and not callable(tokenizer):
        raise OptionError(
            f"tokenizer of type {type(tokenizer).__name__}",
            "a tokenizer of transformers, or a function",
            "pass AutoTokenizer.from_pretrained(...)",
        )
    stream = _Tokens(source, tokenizer, column, split)
    return _batched(stream.windows(length, count), batch_size)


def alternating_batches(
    sources: Iterable[Any], tokenizer: Any, *, length: int, count: int, column: str | None, split: str | None
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of one window of several sources, a window of each in turn; those too short for one are joined.

    Args:
        sources: each as for :func:`token_batches`; no more are opened than there are windows.
        tokenizer, length, count, column, split: as for :func:`token_batches`.

    Raises:
        OptionError, ConversionError: as for :func:`token_batches`.
    """
    read = partial(token_batches, tokenizer=tokenizer, length=length, column=column, split=split)
    left, short = count, []
    streams: Iterator[tuple[Any, Iterator[Any]]] = ((source, read(source, count=count)) for source in sources)
    while left:
        longer = []
        for source, stream in streams:
            try:
                yield next(stream)
            except StopIteration:
                continue
            except NoWindowError:
                short.append(source)
                continue
            longer.append((source, stream))
            left -= 1
            if not left:
                return
        if not longer:
            break
        streams = iter(longer)
    if short:
        try:
            yield from read(short, count=left)
        except NoWindowError:
            if left == count:
                raise


def windows_for(
    model: nn.Module,
    source: Any,
    tokenizer: Any,
    options: CompressOptions | EvaluationConfig,
    usual: int,
    count: int,
) -> list[dict[str, Tensor]]:
    """Return batches of one window of data for a model, as :func:`token_batches` reads it, with a bar.

    Args:
        model: its positions and its vocabulary are the limits.
        source, tokenizer: as for :func:`token_batches`.
        options: length, column, split and progress; a length of None is ``usual``, or as much as the model has positions.
        usual: the usual length.
        count: windows, at most.

    Raises:
        OptionError, ConversionError: as for :func:`token_batches`, or the model cannot read the windows.
    """
    length = window_length(model, options.length, usual)
    column, split = options.column, options.split
    batches = token_batches(source, tokenizer, length=length, count=count, column=column, split=split)
    return list(checked(model, list(over(batches, "reading data", "window", options.progress, count))))


def random_batches(
    model: nn.Module, generator: torch.Generator, *, length: int = 128, count: int = RANDOM_WINDOWS
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of one window of uniformly random tokens, for calibration without data.

    Args:
        model: its embedding, or its ``config.vocab_size``, is the range of the tokens.
        generator: on the CPU; draws the tokens.
        length: tokens in a window; fewer where the model has fewer positions.
        count: number of windows.

    Yields:
        ``{"input_ids": int64 [1, length]}`` on the device of the model's parameters.

    Raises:
        ConversionError: the configuration of the model has no ``vocab_size``.
    """
    sizes = (vocabulary_of(model), embedded_ids(model))
    size = min((size for size in sizes if isinstance(size, int)), default=None)
    if size is None:
        raise ConversionError(
            f"{type(model).__name__} without config.vocab_size",
            "a language model, or batches",
            "pass batches to calibrate with",
        )
    length = min(length, positions_of(model) or length)
    device = next(model.parameters()).device
    for _ in range(count):
        yield {"input_ids": torch.randint(size, (1, length), generator=generator).to(device)}


class _Tokens:
    """The tokens of a source, in order.

    Args:
        source, tokenizer, column, split: as for :func:`token_batches`.
    """

    def __init__(self, source: Any, tokenizer: Any, column: str | None, split: str | None) -> None:
        self._documents = documents(source, tokenizer, column, split)
        self._tokenizer = tokenizer
        self._start: list[int] = []  # what every window begins with
        self._is_first = True

    def windows(self, length: int, count: int) -> Iterator[list[int]]:
        """Yield at most ``count`` windows of ``length`` tokens."""
        pending: list[int] = []
        windows = tokens = 0
        for document in self._documents:
            ids = self._ids(document.content, document.joint)
            tokens += len(ids)
            if len(self._start) >= length:
                raise OptionError(f"length={length}", f"more than {len(self._start)}", "pass a larger length")
            pending, place = pending + ids, 0
            while True:
                start = self._start
                if (
                    pending[place : place + len(start)] == start
                ):  # a text, or a chat template, that brings its own
                    start = []
                end = place + length - len(start)
                if end > len(pending):
                    break
                yield start + pending[place:end]
                place, windows = end, windows + 1
                if windows == count:
                    return
            pending = pending[place:]
        if not windows:
            raise NoWindowError(
                f"a source of {tokens} tokens",
                f"at least one window of {length}",
                "give more text, or a smaller length",
            )

    def _ids(self, content: str | list[int], joint: str) -> list[int]:
        first, self._is_first = self._is_first, False
        if not isinstance(content, str):
            return content
        if self._tokenizer is None:
            raise ConversionError(
                "text without a tokenizer", "a tokenizer for the text", "pass tokenizer=..."
            )
        if first:
            self._start = start_of(self._tokenizer)
        text = content if first else joint + content
        try:
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except TypeError:  # a tokenizer without these options
            return list(self._tokenizer(text)["input_ids"])


def start_of(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts in front of a text."""
    try:
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    except TypeError:
        return []
    whole = list(tokenizer("a")["input_ids"])
    places = range(len(whole) - len(plain) + 1)
    place = next((place for place in places if whole[place : place + len(plain)] == plain), 0)
    return whole[:place]


def _batched(windows: Iterable[list[int]], batch_size: int) -> Iterator[dict[str, Tensor]]:
    batch: list[list[int]] = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield {"input_ids": torch.tensor(batch)}
            batch = []
    if batch:
        yield {"input_ids": torch.tensor(batch)}
