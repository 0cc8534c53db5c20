"""The choice of the next token from logits: greedy, or drawn with a temperature from the likeliest tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dbf_compile.errors import OptionError
from dbf_compile.options import Sampling


def checked(settings: Sampling) -> Sampling:
    """Return settings that say whether tokens are drawn, with a temperature above 0: at 0, the limit of drawing, the
    likeliest token is taken.

    Raises:
        OptionError: a setting of drawing where no token is drawn.
    """
    if settings.temperature == 0:
        return replace(settings, do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None)
    drawing = {
        name: value
        for name in ("temperature", "top_k", "top_p", "min_p")
        if (value := getattr(settings, name)) is not None
    }
    if settings.do_sample is None:
        return replace(settings, do_sample=bool(drawing))
    if drawing and not settings.do_sample:
        name, value = next(iter(drawing.items()))
        raise OptionError(
            f"{name}={value} without drawing",
            "settings of drawing where tokens are drawn",
            "leave out --no-sample (do_sample=False), or the setting for the likeliest token",
        )
    return settings


class Sampler:
    """Chooses one token a row, in the order of transformers: repetition penalty, temperature, top_k, top_p, min_p.

    Args:
        settings: how to choose.
        rows: of the batch; with a seed, row i draws what it alone would draw with seed + i.
        device: of the logits.
    """

    def __init__(self, settings: Sampling, rows: int, device: torch.device) -> None:
        self._settings = settings
        self._generators = (
            None
            if settings.seed is None
            else [torch.Generator(device).manual_seed(settings.seed + row) for row in range(rows)]
        )

    def choose(self, logits: Tensor, history: list[list[int]]) -> Tensor:
        """Return the next tokens, int64 [B], for float32 logits [B, V]; a history is the tokens of a row so far."""
        settings = self._settings
        if settings.repetition_penalty not in (None, 1.0):
            logits = _penalized(logits, history, float(settings.repetition_penalty or 1.0))
        if not settings.do_sample:
            return logits.argmax(-1)
        scores, tokens = self._candidates(logits)
        probabilities = scores.softmax(-1)
        if self._generators is None:
            drawn = torch.multinomial(probabilities, 1)
        else:
            drawn = torch.cat(
                [
                    torch.multinomial(row, 1, generator=generator)[None]
                    for row, generator in zip(probabilities, self._generators, strict=True)
                ]
            )
        return tokens.gather(-1, drawn)[:, 0]

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores in falling order and their tokens; what must not be drawn has the score -inf."""
        settings, vocabulary = self._settings, logits.shape[-1]
        if settings.temperature is not None:
            logits = logits / settings.temperature
        count = min(settings.top_k or vocabulary, vocabulary)
        scores, tokens = logits.topk(count) if count < vocabulary else logits.sort(descending=True)
        if settings.top_p is not None and settings.top_p < 1.0:
            probabilities = scores.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            # The likeliest token stays whatever top_p is.
            before[:, 0] = -1.0
            scores = scores.masked_fill(before >= settings.top_p, -torch.inf)
        if settings.min_p is not None:
            probabilities = scores.softmax(-1)
            scores = scores.masked_fill(probabilities < settings.min_p * probabilities[:, :1], -torch.inf)
        return scores, tokens


def _penalized(logits: Tensor, history: list[list[int]], penalty: float) -> Tensor:
    """Return logits in which tokens of a row's history are less likely, as in Keskar et al. (2019), CTRL."""
    logits = logits.clone()
    for row, tokens in zip(logits, history, strict=True):
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits
