"""Whole models for bench_factorizer: MiniLM's embeddings and the tiny Llama's perplexity, by bits, budget, importance; all "fast"."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import demo
import torch
from sentences import CALIBRATION, EVALUATION
from torch import Tensor, nn

import dbf_compile
from dbf_compile.compression.importance import Importance
from dbf_compile.compression.model import LayerFactorizer
from dbf_compile.factors import stored_bits

DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES, TEXT = DATA / "models" / "stories260K", DATA / "text" / "tinystories-valid-a.txt"
WINDOW, CALIBRATING, JUDGING = 512, 32, 64

Known = Mapping[str, Importance]


def load_encoder() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return MiniLM and its calibration batches."""
    model, tokens = demo.load(blocks=None)
    return model, [tokens(CALIBRATION[start : start + 8]) for start in range(0, len(CALIBRATION), 8)]


def encoder_rows() -> Iterator[dict[str, Any]]:
    """Yield how near the embeddings of compressed encoders are to the dense one's."""
    model, batches = load_encoder()
    _, tokens = demo.load(blocks=1)
    dense = torch.cat(
        [demo.embed(model, tokens(EVALUATION[i : i + 16])) for i in range(0, len(EVALUATION), 16)]
    )
    forms = {
        "none": dict,
        "input only": lambda: dbf_compile.calibrate(model, batches, loss=None),
        "diagonal": lambda: dbf_compile.calibrate(model, batches),
    }
    for bits in (2.0, 1.0):
        for form, make in forms.items():
            for budget in ("equal", "allocated") if form == "diagonal" else ("equal",):
                made, true_bits = compressed(model, bits, make(), budget)
                found = torch.cat(
                    [demo.embed(made, tokens(EVALUATION[i : i + 16])) for i in range(0, len(EVALUATION), 16)]
                )
                pairs = torch.triu_indices(len(found), len(found), 1)
                near = spearman((found @ found.T)[*pairs], (dense @ dense.T)[*pairs])
                yield {
                    "model": "all-MiniLM-L6-v2",
                    "importance": form,
                    "budget": budget,
                    "bits": round(true_bits, 4),
                    "cosine": round(float((found * dense).sum(1).mean()), 4),
                    "rank_agreement": round(near, 4),
                    "pairs": pairs.shape[1],
                }


def language_rows() -> Iterator[dict[str, Any]]:
    """Yield the perplexity of compressed tiny Llamas; nothing where the data is not at hand."""
    if not STORIES.exists():
        print(f"no {STORIES}: the part with perplexities is left out")
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORIES).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    windows = [
        batch["input_ids"]
        for batch in dbf_compile.token_batches(TEXT, tokenizer, length=WINDOW, count=CALIBRATING + JUDGING)
    ]
    calibrating = [{"input_ids": window} for window in windows[:CALIBRATING]]
    judging = torch.cat(windows[CALIBRATING:])
    calibrate = partial(dbf_compile.calibrate, model, calibrating)
    diagonal, kronecker = calibrate(), calibrate(form="kronecker")
    forms: dict[str, Callable[[], Known]] = {
        "none": dict,
        "input only": lambda: calibrate(loss=None),
        "data-free": lambda: dbf_compile.calibrate(model, None),
        "diagonal": lambda: diagonal,
        "diagonal, sampled labels": lambda: calibrate(loss="sampled"),
        "diagonal, shrunk 0.2": lambda: {name: item.shrunk(0.2) for name, item in diagonal.items()},
        "diagonal, tempered": lambda: {name: item.tempered() for name, item in diagonal.items()},
        "diagonal, clipped 0.999": lambda: calibrate(clip=0.999),
        "whole input": lambda: calibrate(form="input"),
        "kronecker": lambda: kronecker,
        "kronecker, shrunk 0.2": lambda: {name: item.shrunk(0.2) for name, item in kronecker.items()},
        "kronecker, tempered": lambda: {name: item.tempered() for name, item in kronecker.items()},
    }
    dense = perplexity(model, judging)
    yield language_row("dense", "", 32.0, dense, dense)
    for bits in (4.0, 3.0, 2.0):
        for form, make in forms.items():
            for budget in ("equal", "allocated"):
                if budget == "allocated" and form not in ("diagonal", "kronecker", "kronecker, tempered"):
                    continue
                made, true_bits = compressed(model, bits, make(), budget)
                yield language_row(form, budget, true_bits, perplexity(made, judging), dense)


def language_row(form: str, budget: str, bits: float, found: float, dense: float) -> dict[str, Any]:
    return {
        "model": "stories260K",
        "importance": form,
        "budget": budget,
        "bits": round(bits, 4),
        "perplexity": round(found, 3),
        "nats_lost": round(math.log(found / dense), 4),
    }


def compressed(model: nn.Module, bits: float, importance: Known, budget: str) -> tuple[nn.Module, float]:
    """Return a compressed copy of ``model`` and the stored bits per weight of its factored layers.

    An allocated budget gets as many bits as equal ones come to, which on small weights is less than was asked for.
    """
    options: dict[str, Any] = {"bits_per_weight": bits, "preset": "fast", "progress": False}
    config = dbf_compile.CompressionConfig(**options)
    allocation = None
    if budget == "allocated":
        jobs = LayerFactorizer(config, importance).jobs(model)
        equal = sum(stored_bits(job.in_features, job.mid_features, job.out_features) for job in jobs) / sum(
            job.size for job in jobs
        )
        found = dbf_compile.allocate(model, importance, **{**options, "bits_per_weight": equal})
        allocation = found.mid_features
    factors = dbf_compile.factorize_model(model, config, importance, allocation)
    tensors = {t.data_ptr(): t for item in factors.values() for t in item.tensors().values()}
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weights = sum(item.in_features * item.out_features for item in factors.values())
    return dbf_compile.convert_(copy.deepcopy(model), factors), stored / weights


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    losses = []
    for batch in windows.split(8):
        logits = model(batch).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return math.exp(torch.stack(losses).mean())


def spearman(left: Tensor, right: Tensor) -> float:
    """Return the correlation of the ranks of two vectors."""
    ranks = torch.stack([left.argsort().argsort(), right.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
