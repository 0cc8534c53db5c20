"""What is promised of language models on a laptop, and which runs say whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import laptop_llama
from laptop_sizes import SMOLLM

_OURS, _SOURCE, _DENSE = "dbf 2 bit", "llama.cpp Q4_1", "bf16 inductor"
_LARGE = "llama-3.2-1b"
_KINDS = tuple(f"llama.cpp {kind}" for kind in laptop_llama.TYPES)
# Q2_0 has no fast kernel: 1,024 tokens take it four minutes, and it is never the best.
_FAST = tuple(kind for kind in _KINDS if not kind.endswith(" Q2_0"))
_THREADS = 2
# Model, variants, and cases: threads, batch, prompt.
BARS: tuple[tuple[str, tuple[str, ...], tuple[tuple[int, int, int], ...]], ...] = (
    (SMOLLM, (_OURS, _SOURCE, _DENSE), ((_THREADS, 1, 128), (_THREADS, 8, 128))),
    (_LARGE, (_OURS, *_KINDS), ((_THREADS, 1, 128),)),
    (_LARGE, (_OURS, *_FAST), ((_THREADS, 1, 1024),)),
    (_LARGE, (_OURS,), ((_THREADS, 8, 128),)),
)


class Bar(NamedTuple):
    """A ratio of two measured rates, and the least that is promised."""

    name: str
    least: float
    ratio: Callable[[Rates], float]


class Rates:
    """The medians of measured rates."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = [row for row in rows if row["threads"] == _THREADS]

    def __call__(self, model: str, variant: str, measure: str, prompt: int = 128, batch: int = 1) -> float:
        """Return a rate, in tokens a second.

        Raises:
            LookupError: it was not measured.
        """
        for row in self._rows:
            key = (row["model"], row["variant"], row["prompt"], row["batch"])
            if key == (model, variant, prompt, batch):
                return float(row[measure])
        raise LookupError(f"{model}, {variant}")

    def over_best(self, measure: str, prompt: int) -> float:
        """Return our rate with the sizes of Llama-3.2-1B over the best of llama.cpp."""
        best = max(self(_LARGE, kind, measure, prompt) for kind in _FAST)
        return self(_LARGE, _OURS, measure, prompt) / best

    def ratio(self, model: str, peer: str, measure: str) -> float:
        """Return our rate at a prompt of 128 over that of a peer."""
        return self(model, _OURS, measure) / self(model, peer, measure)

    def batched(self, model: str) -> float:
        """Return the rate of a batch of 8 over that of one."""
        return self(model, _OURS, "decode_per_s", batch=8) / self(model, _OURS, "decode_per_s")


PROMISES = (
    Bar("SmolLM2-135M, decoding, over Q4_1", 1.5, lambda r: r.ratio(SMOLLM, _SOURCE, "decode_per_s")),
    Bar("SmolLM2-135M, prefill of 128, over Q4_1", 2.0, lambda r: r.ratio(SMOLLM, _SOURCE, "prefill_per_s")),
    Bar(
        "Llama-3.2-1B sizes, decoding, over Q2_K",
        2.2,
        lambda r: r.ratio(_LARGE, "llama.cpp Q2_K", "decode_per_s"),
    ),
    Bar(
        "Llama-3.2-1B sizes, decoding, over TQ2_0",
        1.6,
        lambda r: r.ratio(_LARGE, "llama.cpp TQ2_0", "decode_per_s"),
    ),
    Bar(
        "Llama-3.2-1B sizes, prefill of 128, over the best of llama.cpp",
        1.2,
        lambda r: r.over_best("prefill_per_s", 128),
    ),
    Bar(
        "Llama-3.2-1B sizes, prefill of 1024, over the best of llama.cpp",
        1.2,
        lambda r: r.over_best("prefill_per_s", 1024),
    ),
    Bar("SmolLM2-135M, decoding, batch of 8 over one", 4.0, lambda r: r.batched(SMOLLM)),
    Bar("Llama-3.2-1B sizes, decoding, batch of 8 over one", 4.0, lambda r: r.batched(_LARGE)),
)


def print_bars(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print every promise that was measured, at 2 bits and two threads."""
    rates = Rates(rows)
    print("\nat 2 bits, two threads")
    for bar in PROMISES:
        try:
            ratio = bar.ratio(rates)
        except LookupError:
            print(f"    {'not measured':>12}  {bar.name}")
            continue
        print(
            f"    {'holds' if ratio >= bar.least else 'MISSED':>12}  {bar.name}: {ratio:.2f} (at least {bar.least})"
        )
