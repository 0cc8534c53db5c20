"""``generate`` of transformers for one prompt: it knows all models and all options, token by token at its own speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dbf_compile.errors import OptionError, first_line
from dbf_compile.integrations import pretrained
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.progress import say
from dbf_compile.text_stream import TextStream


def generate(
    model: Any, ids: Tensor, text: TextStream, options: dict[str, Any], compiled: bool, progress: bool
) -> tuple[float, float, float]:
    """Generate one text; return the seconds until the first token, those after it, and those to compile before.

    Args:
        model: of transformers.
        ids: of the prompt, int64 [1, T].
        text: receives the tokens; where it has come to an end, nothing more is generated.
        options: arguments of ``model.generate``; ``seed`` is of the random numbers.
        compiled: whether decoding is compiled: by the backend "dbf" for compressed models, else by Inductor.
        progress: say on stderr what goes on.

    Raises:
        OptionError: an option that transformers refuses.
    """
    options = dict(options)
    seed = options.pop("seed", None)
    settings = {"num_beams": 1, **options, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings |= _compilation(model, compiled)
    streamer = _Streamer(text)
    with _in_our_words(options):
        seconds = _warmed_up(model, settings, progress) if compiled else 0.0
        if seed is not None:
            torch.manual_seed(seed)
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(**settings, streamer=streamer, stopping_criteria=[streamer])
    ended = time.perf_counter()
    first = streamer.first or ended
    return first - began, ended - first, seconds


@contextmanager
def _in_our_words(options: dict[str, Any]) -> Iterator[None]:
    """Say of options of the caller's that transformers refuses them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not options.keys() - {"max_new_tokens", "do_sample"}:
            raise
        raise OptionError(
            f"options {options} of generate ({first_line(error)})",
            "arguments of generate of transformers that go with one sequence and one beam",
            "change or leave out what the message names",
        ) from error


def _warmed_up(model: Any, settings: dict[str, Any], progress: bool) -> float:
    """Return the seconds that two tokens take. The cache gets the length of the real call: programs are compiled for its shape."""
    say("compiling", progress)
    began = time.perf_counter()
    with torch.no_grad():
        model.generate(**settings, stopping_criteria=[_AfterTwo()])
    return time.perf_counter() - began


def _compilation(model: Any, compiled: bool) -> dict[str, Any]:
    if not compiled:
        return {"disable_compile": True}
    factored = any(isinstance(layer, DoubleBinaryLinear) for layer in model.modules())
    return pretrained.compile_options("dbf" if factored else "inductor", next(model.parameters()).device)


class _Streamer:
    """A streamer and a stopping criterion of transformers: passes tokens on, notes the time of the first, stops when told."""

    def __init__(self, text: TextStream) -> None:
        self._text = text
        self._started = False
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        """Receive the prompt (of an encoder-decoder, the decoder's), then one token after the other."""
        if not self._started:
            self._started = True
            return
        self.first = self.first or time.perf_counter()
        self._text.put(int(value))

    def end(self) -> None:
        """Do nothing: the text is ended by its owner."""

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether a stop string has ended the text."""
        return torch.full((ids.shape[0],), self._text.stopped, device=ids.device)


class _AfterTwo:
    """Stops after two new tokens: by then prefill and one step of decoding are compiled."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._calls += 1
        return torch.full((ids.shape[0],), self._calls >= 2, device=ids.device)
