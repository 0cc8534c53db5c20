"""Perplexity of compressed language models against bits: independent and block-corrected, beside OneBit and rounding.

    python benchmarks/train_python_model.py        the larger model, once
    make bench-compress                            both models, about 3 hours
    python benchmarks/compress_models.py --model stories260K --bits 2

Bits are the stored bits per factored weight, scales and padding included; all ways leave the same weights dense. The
peers replace the same layers: OneBit stores one sign per weight and rank-one magnitudes; rounding to nearest stores 2
bits per weight, and a scale and a zero of 16 bits each for every 64 weights, 2.5 bits in all. Ours is measured at the
peers' bits as well. Evaluation uses other text than calibration. All our models pass through ``compress`` and
``from_pretrained``, as a user's do.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from factorizer_models import STORIES, TEXT
from factorizer_peers import GROUP, round_to_nearest
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
LENGTH, EVALUATION_WINDOWS = 512, 32
# Name: folder, text and number of windows for calibration, text for evaluation, and the number of its first windows that
# are skipped, because calibration used them.
MODELS = {
    "stories260K": (STORIES, TEXT, 64, TEXT, 64),
    "python10m": (PYTHON, PYTHON / "train.txt", 24, PYTHON / "valid.txt", 0),
}
# Options of compress, by the names in the tables ("block" is the mode "sequential"); stages are added one by one.
WAYS: dict[str, dict[str, Any]] = {
    "independent": {"mode": "independent", "distill": 0},
    "independent, distilled": {"mode": "independent"},
    "block, factored only": {"mode": "sequential", "tune": 0, "refine": 0, "distill": 0},
    "block, tuned": {"mode": "sequential", "refine": 0, "distill": 0},
    "block, tuned, refined": {"mode": "sequential", "distill": 0},
    "block": {"mode": "sequential"},
}
ALL_STAGES_AT = 2.0  # at other bits only "independent" and "block"


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
    """Yield a row for every way to compress one model, at ``bits``; by default at BITS and at those of the peers."""
    folder, calibration, windows, text, skipped = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    evaluation = list(
        dbf_compile.token_batches(text, tokenizer, length=LENGTH, count=skipped + EVALUATION_WINDOWS)
    )[skipped:]
    batches = list(dbf_compile.token_batches(calibration, tokenizer, length=LENGTH, count=windows))

    def row(way: str, true_bits: float, model: nn.Module, seconds: float) -> dict[str, Any]:
        metrics = compare(dense, model, evaluation)
        return {
            "model": name,
            "way": way,
            "bits": round(true_bits, 4),
            "perplexity": round(metrics["perplexity"], 3),
            "nats_lost": round(metrics["compressed"] - metrics["dense"], 4),
            "kl": round(metrics["kl"], 4),
            "top1_agreement": round(metrics["top1_agreement"], 4),
            "seconds": round(seconds, 1),
        }

    yield row("dense", 32.0, dense, 0.0)
    importance = dbf_compile.calibrate(dense, batches)
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
                compressed = dbf_compile.compress(
                    folder,
                    Path(place) / "compressed",
                    bits=target,
                    data=calibration,
                    length=LENGTH,
                    windows=windows,
                    own_text=0,  # the text that peers read
                    holdout=0,
                    preset="fast",
                    progress=False,
                    **WAYS[way],
                )
                seconds = time.perf_counter() - began
                model = AutoModelForCausalLM.from_pretrained(compressed.folder).eval()
                yield row(way, compressed.report["bits"]["factored"], model, seconds)


def replaced(
    dense: nn.Module,
    importance: dict[str, Importance],
    approximate: Callable[[Tensor, Importance], tuple[Tensor, int]],
) -> tuple[nn.Module, float]:
    """Return a copy in which the weights to be factored are approximated, and its stored bits per weight."""
    model = copy.deepcopy(dense)
    layers = dense_linears(model)
    stored = weights = 0
    config = dbf_compile.CompressionConfig(progress=False)
    for job in LayerFactorizer(config).jobs(model):
        for name in job.names:
            weight = dense_weight(layers[name])
            approximation, bits = approximate(weight, importance[name])
            weight.copy_(approximation)
            stored, weights = stored + bits, weights + weight.numel()
    return model, stored / weights


def one_sign(weight: Tensor, importance: Importance) -> tuple[Tensor, int]:
    """Return OneBit's approximation ``diag(scale_out) · signs · diag(scale_in)``, fitted with the importance, and its bits."""
    single = onebit(weight, importance)
    return single.dense(), single.bits()


def rounded(weight: Tensor, importance: Importance) -> tuple[Tensor, int]:
    """Return ``weight`` rounded to 2 bits, with a minimum and a step of 16 bits for every 64 weights, and its bits."""
    return round_to_nearest(weight, 2), 2 * weight.numel() + 32 * weight.numel() // GROUP


PEERS = {"OneBit": one_sign, "round to nearest": rounded}


if __name__ == "__main__":
    main()
