"""A sentence encoder: calibrate it, compile it at two bits per weight, compare its embeddings with the dense ones.

python examples/sentence_encoder.py              a tiny random BERT, made on the spot
python examples/sentence_encoder.py FOLDER       an encoder of sentence-transformers, such as all-MiniLM-L6-v2
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import dbf_compile

SENTENCES = ("Signs are added.", "Scales are multiplied.", "A model gets small.", "Rain falls on the roof.")


def tiny_encoder() -> tuple[nn.Module, Any]:
    """Return a random BERT, and a function from texts to its input: their letters."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

    def tokens(texts: tuple[str, ...], **_: Any) -> dict[str, Tensor]:
        rows = [[ord(letter) % 256 for letter in text.ljust(32)[:32]] for text in texts]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), 32).long()}

    return BertModel(BertConfig(vocab_size=256, **sizes)), tokens


def embed(model: Any, batch: Any) -> Tensor:
    """Return sentence embeddings [sentences, features]: normalized means over the tokens."""
    mask = batch["attention_mask"].unsqueeze(-1)
    summed = (model(**batch).last_hidden_state * mask).sum(1)
    return nn.functional.normalize(summed / mask.sum(1), dim=-1)


def main() -> None:
    """Compress an encoder and compare it with itself."""
    if len(sys.argv) == 2:
        model, tokens = AutoModel.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
    else:
        model, tokens = tiny_encoder()
    model = model.eval().requires_grad_(False)
    batch = dict(tokens(SENTENCES, padding="max_length", max_length=32, truncation=True, return_tensors="pt"))

    # Of an encoder without labels, the size of its output's derivatives says what matters.
    importance = dbf_compile.calibrate(model, [batch])
    options = {"bits_per_weight": 2.0, "preset": "fast", "importance": importance}
    compiled = torch.compile(copy.deepcopy(model), backend="dbf", options=options)
    with torch.no_grad():
        similarity = (embed(model, batch) * embed(compiled, batch)).sum(-1)
    print(f"cosine with the dense embeddings: mean {similarity.mean():.4f}, lowest {similarity.min():.4f}")


if __name__ == "__main__":
    main()
