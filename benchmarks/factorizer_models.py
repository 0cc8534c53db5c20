"""Whole models for bench_factorizer: MiniLM's embeddings and the tiny Llama's perplexity, by bits, budget, importance."""

from __future__ import annotations

import demo
from sentences import CALIBRATION
from torch import Tensor, nn


def load_encoder() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return MiniLM and its calibration batches."""
    model, tokens = demo.load(blocks=None)
    return model, [tokens(CALIBRATION[start : start + 8]) for start in range(0, len(CALIBRATION), 8)]


def encoder_rows():
    raise NotImplementedError


def language_rows():
    raise NotImplementedError
