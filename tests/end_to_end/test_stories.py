"""A tiny pretrained Llama on real text, where both are at hand."""

import math
from pathlib import Path

import pytest
import torch
from support.models.tiny import error_of

import dbf_compile

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL, TEXT = DATA / "models" / "stories260K", DATA / "text" / "tinystories-valid-a.txt"
WINDOW, WINDOWS = 256, 16

pytestmark = [
    pytest.mark.skipif(not MODEL.exists() or not TEXT.exists(), reason=f"needs {DATA}"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def windows():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = tokenizer(TEXT.read_text()[:30_000], return_tensors="pt").input_ids[0]
    return tokens[: WINDOW * WINDOWS].view(-1, WINDOW)


def load():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).eval().requires_grad_(False)


@torch.no_grad()
def perplexity(run, windows):
    losses = []
    for batch in windows.split(8):
        logits = run(batch).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return math.exp(torch.stack(losses).mean())


def language_loss(output, batch):
    return torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def test_perplexity_at_four_and_two_bits(windows, record_property):
    dense = perplexity(load(), windows)
    importance = dbf_compile.calibrate(load(), windows[:4].split(1), loss=language_loss)
    options = {"importance": importance, "iterations": 40, "progress": False}
    eager = {bits: dbf_compile.convert_(load(), bits_per_weight=bits, **options) for bits in (4.0, 2.0)}
    perplexities = {bits: perplexity(model, windows) for bits, model in eager.items()}
    run = torch.compile(load(), backend="dbf", fullgraph=True, options={"bits_per_weight": 2.0, **options})
    with torch.no_grad():
        logits = run(windows[:8]).logits
        # Five layers of float32 sums of at most 172 products behind norms and softmax, in another order.
        assert error_of(logits, eager[2.0](windows[:8]).logits) < 1e-3
    for name, value in {"dense": dense, **perplexities}.items():
        record_property(f"perplexity, {name}", round(value, 3))
    print(f"\nperplexity: dense {dense:.3f}, 4 bits {perplexities[4.0]:.3f}, 2 bits {perplexities[2.0]:.3f}")
    assert (
        dense < perplexities[4.0] < perplexities[2.0] < 512
    )  # 512: that of a uniform guess among its tokens
