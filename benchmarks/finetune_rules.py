"""How signs should learn: rules compared on a model of 260 thousand parameters, at one and two bits, with fresh text.

    python benchmarks/finetune_rules.py [--bits 1.0] [--rules latents score]

The model is compressed with the first quarter of the text; a run learns from the rest, each window once, but for 64 windows
of 256 tokens that it is judged with. Everything else is as in ``dbf_compile.finetune``. The table is
``benchmarks/results/finetune.csv``; runs that it has are not done again.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, provenance, write_results
from torch import Tensor

import dbf_compile
from dbf_compile.finetuning import weights
from dbf_compile.finetuning.learner import Learner, Rates
from dbf_compile.finetuning.ranks import Ranks
from dbf_compile.finetuning.targets import Teacher
from dbf_compile.finetuning.text import Text
from dbf_compile.finetuning.training import rate_share
from dbf_compile.integrations import pretrained
from dbf_compile.options import FinetuneConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
DENSE, TEXT = SHARED / "models" / "stories260K", SHARED / "text" / "tinystories-valid-a.txt"
OUT = Path(__file__).parents[1] / "out" / "finetune"
COLUMNS = ["bits", "rule", "rate", "bytes_per_sign", "tokens", "kl_before", "kl_after", "flips", "seconds"]
SETTINGS: dict[str, Any] = {"length": 256, "batch": 2, "holdout": 64, "top": 512, "progress": False}
# The defaults serve real models; one that is so small learns more with larger rates.
SETTINGS |= {"scale_rate": 0.01, "norm_rate": 0.001}


class Adam(weights.Latents):
    """Latents with both moments of Adam for every sign."""

    def step(self, gradient: Tensor, rate: float) -> int:
        """Move the latents."""
        if not hasattr(self, "mean"):
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.05)
        moved = self.mean / (1 - 0.9 ** float(self.steps))
        moved /= (self.square / (1 - 0.95 ** float(self.steps))).sqrt() + 1e-30
        return self.move(moved, rate)


class Accumulators(weights.Latents):
    """A sign that flips begins anew at a distance of one, where latents go on from zero."""

    def move(self, direction: Tensor, rate: float) -> int:
        """Move the latents."""
        before = self.values < 0
        flips = super().move(direction, rate)
        flipped = before != (self.values < 0)
        self.values[flipped] = self.values[flipped].sign()
        return flips


class Score(weights.Latents):
    """A share of the signs flips in every step: those whose gradient, a mean of some steps, asks for it most."""

    def move(self, direction: Tensor, rate: float) -> int:
        """Flip the best ``rate`` of all signs."""
        if not hasattr(self, "mean"):
            self.mean = torch.zeros_like(direction)
        self.mean.lerp_(direction, 0.1)
        score = (self.mean * self.values).flatten()
        best, places = score.topk(max(1, round(rate * score.numel())))
        places = places[best > 0]
        self.values.view(-1)[places] *= -1
        self.mean.view(-1)[places] = 0
        return len(places)


# By name: what moves signs, bytes of state for each, rates.
RULES: dict[str, tuple[type[weights.Latents], int, tuple[float, ...]]] = {
    "scales alone": (weights.Latents, 0, (0.0,)),
    "latents": (weights.Latents, 2, (0.0003, 0.01, 0.03, 0.1)),
    "latents, Adam": (Adam, 10, (0.03,)),
    "score": (Score, 4, (0.0005,)),
    "accumulators": (Accumulators, 2, (0.1,)),
}


def compressed(bits: float) -> Path:
    """Return the folder that all rules start from."""
    folder = OUT / f"{bits}"
    if not folder.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        text = TEXT.read_text()
        calibration = {"windows": 32, "holdout": 0, "tune": 1, "refine": 2, "distill": 1, "own_text": 0.0}
        dbf_compile.compress(
            DENSE, folder, data=[text[: len(text) // 4]], bits=bits, preset="fast", **calibration
        )
    return folder


def run(bits: float, rule: str, rate: float) -> dict[str, Any]:
    """Return the row of one run."""
    kind, state, _ = RULES[rule]
    weights.Latents, usual = kind, weights.Latents  # type: ignore[misc]
    config = FinetuneConfig(tokens=2**20, **SETTINGS)
    text = TEXT.read_text()
    dense = pretrained.open_dense(DENSE)
    windows = Text.read([text[len(text) // 4 :]], pretrained.tokenizer_of(DENSE), dense, config)
    teacher = Teacher(lambda: dense, "stories260K", config.top, OUT / "targets", torch.device("cpu"))
    try:
        learner = Learner(pretrained.open_any(compressed(bits)), teacher, config, torch.float32, Ranks())
    finally:
        weights.Latents = usual  # type: ignore[misc]
    judging = windows.judging["text"].long()
    before, flips = learner.divergence(judging), 0
    steps = windows.learning.long().split(config.batch)
    for part in windows.learning.long():
        teacher.targets(part[None])  # not part of the seconds
    began = time.perf_counter()
    for step, part in enumerate(steps):
        share = rate_share(step, len(steps))
        rates = Rates(share * rate, share * config.scale_rate, share * config.norm_rate)
        flips += learner.step(part, rates)[1]
    seconds = time.perf_counter() - began
    after = learner.divergence(judging)
    values = (
        bits,
        rule,
        rate,
        state,
        windows.learning.numel(),
        before,
        after,
        flips / learner.signs,
        seconds,
    )
    shown = (f"{value:.5g}" if isinstance(value, float) else value for value in values)
    return {**dict(zip(COLUMNS, shown, strict=True)), **provenance()}


def main() -> None:
    """Run what the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0, 1.0])
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--table", default="finetune", help="name of the table among the results")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.table}.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    known = {(float(row["bits"]), row["rule"], float(row["rate"])) for row in rows}
    for bits in arguments.bits:
        for rule in arguments.rules:
            for rate in RULES[rule][2]:
                if (bits, rule, rate) not in known:
                    rows.append(run(bits, rule, rate))
                    print(rows[-1], flush=True)
                    write_results(arguments.table, rows)


if __name__ == "__main__":
    main()
