"""How signs should learn: rules compared on a model of 260 thousand parameters, at one and two bits, with fresh text.

    python benchmarks/finetune_rules.py [--bits 1.0] [--rules scores latents]

The model is compressed with the first quarter of the text; a run learns from the rest, each window once, but for 64 windows
of 256 tokens that it is judged with. Everything else is as in ``dbf_compile.finetune``. The table is
``benchmarks/results/finetune.csv``; runs that it has are not done again. Rows of rules that are not here are of the commits
that they name: latents by Adam, latents that begin anew after a flip, and a share of all signs in every single step.
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
from dbf_compile.factorizer.projection import signs_of
from dbf_compile.finetuning import weights
from dbf_compile.finetuning.learner import Learner, Rates
from dbf_compile.finetuning.ranks import Ranks
from dbf_compile.finetuning.targets import Teacher
from dbf_compile.finetuning.text import Text
from dbf_compile.finetuning.training import rate_share, rates_at
from dbf_compile.integrations import pretrained
from dbf_compile.options import FinetuneConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
DENSE, TEXT = SHARED / "models" / "stories260K", SHARED / "text" / "tinystories-valid-a.txt"
OUT = Path(__file__).parents[1] / "out" / "finetune"
COLUMNS = ["bits", "rule", "rate", "bytes_per_sign", "tokens", "kl_before", "kl_after", "flips", "seconds"]
SETTINGS: dict[str, Any] = {"length": 256, "batch": 2, "holdout": 64, "top": 512, "progress": False}
# The defaults serve real models; one that is so small learns more with larger rates.
SETTINGS |= {"scale_rate": 0.01, "norm_rate": 0.001}


class Latents(weights.Signs):
    """A sign is that of a latent number, which collects the gradient of its sign (straight-through estimator).

    Gradients are divided by second moments of rows and columns (Adafactor). ``share`` is the rate, in units of where latents begin.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.latents = values.float()
        self.rows, self.columns = (torch.zeros(size) for size in values.shape)
        self.steps = 0

    def flip(self, gradient: Tensor, share: float) -> int:
        """Move the latents."""
        self.steps += 1
        square = gradient.square()
        self.rows.lerp_(square.mean(1) + 1e-30, 0.05)
        self.columns.lerp_(square.mean(0) + 1e-30, 0.05)
        rows = (self.rows / self.rows.mean()).sqrt()
        columns = (self.columns / (1 - 0.95**self.steps)).sqrt()
        self.latents.sub_(gradient / rows[:, None] / columns, alpha=share).clamp_(-2, 2)
        before = self.values.clone()
        self.values.copy_(signs_of(self.latents))
        return int((before != self.values).sum())


# By name: what moves signs, bytes of state for each at two bits, rates.
RULES: dict[str, tuple[type[weights.Signs], int, tuple[float, ...]]] = {
    "scales alone": (weights.Signs, 0, (0.0,)),
    "scores": (weights.Signs, 2, (0.005, 0.2, 0.5, 1.0, 2.0)),
    "latents": (Latents, 2, (0.01, 0.03, 0.1)),
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
    weights.Signs, usual = kind, weights.Signs  # type: ignore[misc]
    config = FinetuneConfig(tokens=2**20, sign_rate=rate, **SETTINGS)
    text = TEXT.read_text()
    dense = pretrained.open_dense(DENSE)
    windows = Text.read([text[len(text) // 4 :]], pretrained.tokenizer_of(DENSE), dense, config)
    teacher = Teacher(lambda: dense, "stories260K", config.top, OUT / "targets", torch.device("cpu"))
    try:
        learner = Learner(pretrained.open_any(compressed(bits)), teacher, config, torch.float32, Ranks())
    finally:
        weights.Signs = usual  # type: ignore[misc]
    judging = windows.judging["text"].long()
    before, flips = learner.divergence(judging), 0
    steps = windows.learning.long().split(config.batch)
    for window in windows.learning.long():
        teacher.targets(window[None])  # not part of the seconds
    began = time.perf_counter()
    for step, part in enumerate(steps):
        rates = rates_at(config, step, len(steps), steps[0].numel())
        if kind is Latents:
            rates = Rates(rates.scales, rates.norms, rate_share(step, len(steps)) * rate)
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
