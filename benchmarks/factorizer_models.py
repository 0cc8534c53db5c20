"""Whole models for bench_factorizer: embeddings of MiniLM and perplexity of a tiny Llama, by bits, budget and importance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import encoder as sentence_encoder
import torch
from sentences import CALIBRATION, EVALUATION
from torch import Tensor, nn

import dbf_compile
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import stored_bits

DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES, TEXT = DATA / "models" / "stories260K", DATA / "text" / "tinystories-valid-a.txt"
WINDOW, CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 512, 32, 64

# Both budgets are compared for these forms of importance; the others are variants of one of them.
BOTH_BUDGETS = ("none", "input only", "diagonal", "whole input", "kronecker", "kronecker, tempered")

Importances = Mapping[str, Importance]


def load_encoder() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return MiniLM and its calibration batches."""
    model, tokens = sentence_encoder.load(blocks=None)
    return model, [tokens(CALIBRATION[start : start + 8]) for start in range(0, len(CALIBRATION), 8)]


def encoder_rows() -> Iterator[dict[str, Any]]:
    """Yield how close the embeddings of compressed encoders are to those of the dense one."""
    model, batches = load_encoder()
    _, tokens = sentence_encoder.load(blocks=1)
    dense = embeddings(model, tokens)
    forms: dict[str, Importances] = {
        "none": {},
        "input only": dbf_compile.calibrate(model, batches, loss=None),
        "diagonal": dbf_compile.calibrate(model, batches),
        "whole input": dbf_compile.calibrate(model, batches, curvature="input"),
    }
    kronecker = dbf_compile.calibrate(model, batches, curvature="kronecker")
    forms["kronecker"] = kronecker
    forms["kronecker, tempered"] = {name: item.tempered() for name, item in kronecker.items()}
    for bits in (2.0, 1.0):
        for form, importance in forms.items():
            for budget in ("equal", "allocated"):
                encoder, true_bits = compressed(model, bits, importance, budget)
                vectors = embeddings(encoder, tokens)
                pairs = torch.triu_indices(len(vectors), len(vectors), 1)
                agreement = spearman((vectors @ vectors.T)[*pairs], (dense @ dense.T)[*pairs])
                yield {
                    "model": "all-MiniLM-L6-v2",
                    "importance": form,
                    "budget": budget,
                    "bits": round(true_bits, 4),
                    "cosine": round(float((vectors * dense).sum(1).mean()), 4),
                    "rank_agreement": round(agreement, 4),
                    "pairs": pairs.shape[1],
                }


def embeddings(model: nn.Module, tokens: Callable[..., dict[str, Tensor]]) -> Tensor:
    """Return the embeddings of the evaluation sentences."""
    batches = [EVALUATION[start : start + 16] for start in range(0, len(EVALUATION), 16)]
    return torch.cat([sentence_encoder.embed(model, tokens(batch)) for batch in batches])


def language_matrices() -> list[tuple[str, Tensor, Importance]]:
    """Return name, weight and importance of three weights of the tiny Llama; none where its files are missing."""
    if not STORIES.exists():
        return []
    model, batches, _ = load_language()
    importance = dbf_compile.calibrate(model, batches)
    names = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    layers = dict(model.named_modules())
    return [
        (f"stories260K {name}", layers[path].weight.detach(), importance[path])
        for name in names
        for path in [f"model.layers.2.{name}"]
    ]


def load_language() -> tuple[nn.Module, list[dict[str, Tensor]], Tensor]:
    """Return the tiny Llama, its calibration batches, and the windows of tokens for evaluation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORIES).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    batches = list(
        dbf_compile.token_batches(
            TEXT, tokenizer, length=WINDOW, count=CALIBRATION_WINDOWS + EVALUATION_WINDOWS
        )
    )
    return (
        model,
        batches[:CALIBRATION_WINDOWS],
        torch.cat([batch["input_ids"] for batch in batches[CALIBRATION_WINDOWS:]]),
    )


def language_rows() -> Iterator[dict[str, Any]]:
    """Yield the perplexity of compressed tiny Llamas; nothing where the files are missing."""
    if not STORIES.exists():
        print(f"no {STORIES}: the part with perplexities is left out")
        return
    model, batches, windows = load_language()
    calibrate = partial(dbf_compile.calibrate, model, batches)
    diagonal, kronecker = calibrate(), calibrate(curvature="kronecker")
    forms: dict[str, Importances] = {
        "none": {},
        "input only": calibrate(loss=None),
        "data-free": dbf_compile.calibrate(model, None),
        "diagonal": diagonal,
        "diagonal, sampled labels": calibrate(loss="sampled"),
        "diagonal, shrunk 0.2": {name: item.shrunk(0.2) for name, item in diagonal.items()},
        "diagonal, tempered": {name: item.tempered() for name, item in diagonal.items()},
        "diagonal, clipped 0.999": calibrate(clip=0.999),
        "whole input": calibrate(curvature="input"),
        "kronecker": kronecker,
        "kronecker, shrunk 0.2": {name: item.shrunk(0.2) for name, item in kronecker.items()},
        "kronecker, tempered": {name: item.tempered() for name, item in kronecker.items()},
    }
    dense = perplexity(model, windows)
    yield language_row("dense", "", 32.0, dense, dense)
    for bits in (4.0, 3.0, 2.0):
        for form, importance in forms.items():
            for budget in ("equal", "allocated"):
                if budget == "allocated" and form not in BOTH_BUDGETS:
                    continue
                llama, true_bits = compressed(model, bits, importance, budget)
                yield language_row(form, budget, true_bits, perplexity(llama, windows), dense)


def language_row(form: str, budget: str, bits: float, compressed: float, dense: float) -> dict[str, Any]:
    return {
        "model": "stories260K",
        "importance": form,
        "budget": budget,
        "bits": round(bits, 4),
        "perplexity": round(compressed, 3),
        "nats_lost": round(math.log(compressed / dense), 4),
    }


def compressed(
    model: nn.Module, bits: float, importance: Importances, budget: str
) -> tuple[nn.Module, float]:
    """Return a compressed copy of ``model`` and the stored bits per weight of its factored layers.

    An allocated budget gets as many bits as the equal ones use, which on small weights is less than ``bits``.
    """
    config = dbf_compile.CompressionConfig(bits_per_weight=bits, preset="fast", progress=False)
    allocation = None
    if budget == "allocated":
        jobs = LayerFactorizer(config, importance).jobs(model)
        equal = sum(stored_bits(job.in_features, job.mid_features, job.out_features) for job in jobs) / sum(
            job.size for job in jobs
        )
        allocation = dbf_compile.allocate(model, importance, config=config, bits_per_weight=equal)
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
