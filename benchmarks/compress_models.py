"""Perplexity of compressed language models against bits: independent and block-corrected, beside OneBit and rounding.

    python benchmarks/train_python_model.py        the larger model, once
    make bench-compress                            both models; the seconds of both tables add up to 3 hours
    python benchmarks/compress_models.py --model stories260K --bits 2

Bits are what is stored of the factored weights, scales and padding counted; all ways leave the same weights dense. The
peers are asked for the very layers that are factored: one sign per weight and rank-one magnitudes (OneBit), and rounding
to 2 bits to nearest in groups of 64 (2 bits, a scale and a zero in 16 bits each: 2.5). Ours is measured at their bits,
too, beside the round ones. The text to judge by is not that to calibrate with. Every way of ours goes through ``compress``
and ``from_pretrained`` as a user's does.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_factorizer import GROUP, round_to_nearest
from factorizer_models import STORIES, TEXT
from measure import commit, processor, versions, write_results
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dbf_compile
from dbf_compile.calibration.compare import compare
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import onebit
from dbf_compile.linear import dense_linears, dense_weight

PYTHON = Path(__file__).parents[1] / "out" / "python10m"
BITS = (2.0, 1.0, 4.0, 3.0, 1.5)
LENGTH, JUDGING = 512, 32
# Name: folder, text to calibrate with and how many windows of it, text to judge by, and how many windows of it are left
# out: those of the calibration, where both are one text.
MODELS = {
    "stories260K": (STORIES, TEXT, 64, TEXT, 64),
    "python10m": (PYTHON, PYTHON / "train.txt", 24, PYTHON / "valid.txt", 0),
}
# What compress is asked for: stages are added one by one.
WAYS: dict[str, dict[str, Any]] = {
    "independent": {"mode": "independent", "distill": 0},
    "independent, distilled": {"mode": "independent"},
    "block, factored only": {"mode": "block", "tune": 0, "refine": 0, "distill": 0},
    "block, tuned": {"mode": "block", "refine": 0, "distill": 0},
    "block, tuned, refined": {"mode": "block", "distill": 0},
    "block": {"mode": "block"},
}
ALL_STAGES_AT = 2.0  # the other bits get the two that are compared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--bits", type=float, action="append")
    arguments = parser.parse_args()
    for name in arguments.model or MODELS:
        if not MODELS[name][0].exists():
            print(f"no {MODELS[name][0]}: {name} is left out")
            continue
        rows: list[dict[str, Any]] = []
        for row in model_rows(name, arguments.bits):
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write_results(f"compress_{name}", rows)
    print(f"{processor()}; {versions()}; commit {commit()}")


def model_rows(name: str, bits: list[float] | None) -> Iterator[dict[str, Any]]:
    """Yield a row for every way to compress one model, at ``bits`` or at all of BITS and those of the peers."""
    folder, calibration, windows, text, skipped = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    judging = list(dbf_compile.token_batches(text, tokenizer, length=LENGTH, count=skipped + JUDGING))[
        skipped:
    ]
    calibrating = list(dbf_compile.token_batches(calibration, tokenizer, length=LENGTH, count=windows))

    def row(way: str, true_bits: float, model: nn.Module, seconds: float) -> dict[str, Any]:
        found = compare(dense, model, judging)
        return {
            "model": name,
            "way": way,
            "bits": round(true_bits, 4),
            "perplexity": round(found["perplexity"], 3),
            "nats_lost": round(found["compressed"] - found["dense"], 4),
            "kl": round(found["kl"], 4),
            "top1_agreement": round(found["top1_agreement"], 4),
            "seconds": round(seconds, 1),
        }

    yield row("dense", 32.0, dense, 0.0)
    importance = dbf_compile.calibrate(dense, calibrating)
    targets = list(bits or BITS)
    for peer, approximate in PEERS.items():
        began = time.perf_counter()
        model, true_bits = replaced(dense, importance, approximate)
        if not bits:
            targets.append(true_bits)
        yield row(peer, true_bits, model, time.perf_counter() - began)
    for target in targets:
        ways = WAYS if target == ALL_STAGES_AT else ("independent", "block")
        for way in ways:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as place:
                made = dbf_compile.compress(
                    folder,
                    Path(place) / "made",
                    bits=target,
                    data=calibration,
                    length=LENGTH,
                    windows=windows,
                    holdout=0,
                    preset="fast",
                    progress=False,
                    **WAYS[way],
                )
                seconds = time.perf_counter() - began
                model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
                yield row(way, made.report["bits"]["factored"], model, seconds)


def replaced(
    dense: nn.Module,
    importance: dict[str, Importance],
    approximate: Callable[[Tensor, Importance], tuple[Tensor, int]],
) -> tuple[nn.Module, float]:
    """Return a copy with approximations of the weights that would be factored, and the bits they are stored in."""
    model = copy.deepcopy(dense)
    layers = dense_linears(model)
    stored = weights = 0
    config = dbf_compile.CompressionConfig(progress=False)
    for job in LayerFactorizer(config).jobs(model):
        for name in job.names:
            weight = dense_weight(layers[name])
            found, bits = approximate(weight, importance[name])
            weight.copy_(found)
            stored, weights = stored + bits, weights + weight.numel()
    return model, stored / weights


def one_sign(weight: Tensor, importance: Importance) -> tuple[Tensor, int]:
    """OneBit's form: ``diag(scale_out) · signs · diag(scale_in)``, fitted with the importance."""
    made = onebit(weight, importance)
    return made.dense(), made.bits()


def rounded(weight: Tensor, importance: Importance) -> tuple[Tensor, int]:
    """Two bits to nearest, a minimum and a step in 16 bits for every 64 weights."""
    return round_to_nearest(weight, 2), 2 * weight.numel() + 32 * weight.numel() // GROUP


PEERS = {"OneBit": one_sign, "round to nearest": rounded}


if __name__ == "__main__":
    main()
