"""Batches of tokens for calibration: from a text file, from texts, from a ``datasets`` object, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.errors import ConversionError, OptionError

_SEPARATOR = "\n\n"  # between documents, as usual in evaluations of perplexity


def token_batches(
    source: str | Path | Iterable[Any],
    tokenizer: Any,
    *,
    length: int = 512,
    count: int = 64,
    batch_size: int = 1,
    column: str = "text",
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of consecutive windows of tokens, without padding; equal arguments give equal batches.

    Documents are joined by blank lines and cut every ``length`` tokens. Tokens after the last full window are dropped.
    The source is read no further than needed.

    Args:
        source: path of a text file in UTF-8, an iterable of texts, or an iterable of rows with a column of texts, such as
            a ``datasets.Dataset``.
        tokenizer: of transformers, or any function with ``tokenizer(text)["input_ids"]`` a list of ids.
        length: tokens in a window, 2 or more.
        count: windows, at most; fewer where the source is short.
        batch_size: windows in a batch; the last batch may have fewer.
        column: name of the column of texts.

    Yields:
        ``{"input_ids": int64 [batch, length]}``

    Raises:
        OptionError: a length, count or batch size is out of range.
        ConversionError: the source cannot be read, has another type, or holds less than one window.
    """
    for name, value, low in (("length", length, 2), ("count", count, 1), ("batch_size", batch_size, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise OptionError(f"{name}={value!r}", f"a whole number of {low} or more", f"leave {name} out")
    return _batched(_windows(source, tokenizer, length, count, column), batch_size)


def random_batches(
    model: nn.Module, generator: torch.Generator, *, length: int = 128, count: int = 16
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of one window of uniformly random tokens, for calibration without data.

    Args:
        model: its ``config.vocab_size`` is the range of the tokens.
        generator: on the CPU; draws the tokens.
        length: tokens in a window; fewer where the model has fewer positions.
        count: number of windows.

    Yields:
        ``{"input_ids": int64 [1, length]}`` on the device of the model's parameters.

    Raises:
        ConversionError: the configuration of the model has no ``vocab_size``.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise ConversionError(
            f"{type(model).__name__} without config.vocab_size",
            "a language model, or batches",
            "pass batches to calibrate with",
        )
    length = min(length, getattr(config, "max_position_embeddings", length))
    device = next(model.parameters()).device
    for _ in range(count):
        yield {"input_ids": torch.randint(size, (1, length), generator=generator).to(device)}


def _windows(
    source: str | Path | Iterable[Any], tokenizer: Any, length: int, count: int, column: str
) -> Iterator[list[int]]:
    pending: list[int] = []
    windows = tokens = 0
    for number, text in enumerate(_texts(source, column)):
        ids = _ids(tokenizer, text if number == 0 else _SEPARATOR + text)
        tokens += len(ids)
        pending += ids
        while len(pending) >= length:
            yield pending[:length]
            windows += 1
            if windows == count:
                return
            pending = pending[length:]
    if not windows:
        raise ConversionError(
            f"a source of {tokens} tokens",
            f"at least one window of {length}",
            "give more text, or a smaller length",
        )


def _texts(source: str | Path | Iterable[Any], column: str) -> Iterator[str]:
    if isinstance(source, (str, Path)):
        try:
            yield Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(
                f"{str(source)[:80]!r}, which cannot be read ({error})",
                "the path of a text file in UTF-8",
                "check the path; pass a text itself as [text]",
            ) from error
        return
    if not isinstance(source, Iterable):
        raise ConversionError(
            f"a source of type {type(source).__name__}",
            "a path, texts, or rows with a column of texts",
            "pass [text]",
        )
    for item in source:
        text = item.get(column) if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            kind = f"columns {sorted(item)}" if isinstance(item, Mapping) else f"type {type(item).__name__}"
            raise ConversionError(
                f"an item with {kind}",
                f"a text, or a row with a text in column {column!r}",
                "pass column=...",
            )
        yield text


def _ids(tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except TypeError:  # a tokenizer without these options
        return list(tokenizer(text)["input_ids"])


def _batched(windows: Iterable[list[int]], batch_size: int) -> Iterator[dict[str, Tensor]]:
    batch: list[list[int]] = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield {"input_ids": torch.tensor(batch)}
            batch = []
    if batch:
        yield {"input_ids": torch.tensor(batch)}
