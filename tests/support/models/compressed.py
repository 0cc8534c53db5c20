"""A tiny folder that was compressed, to be trained further, beside the dense model that it was made from."""

from pathlib import Path
from typing import Any

from support.models.pretrained import text_of, tiny_folder, tiny_tokenizer
from support.models.tiny import factored, tiny_llama

# Windows and steps are short: these tests are about what is kept and what changes, not about quality.
SHORT: dict[str, Any] = {
    "length": 16,
    "tokens": 640,
    "holdout": 3,
    "judge": 2,
    "batch": 2,
    "sign_rate": 20.0,
    "scale_rate": 0.01,
    "norm_rate": 0.001,
    "progress": False,
}


def compressed_folder(place: Path) -> dict[str, Any]:
    """Return arguments of ``finetune``: a compressed folder of two bits, its text, and the dense model."""
    dense = tiny_folder(place / "dense", model=tiny_llama())
    folder = place / "compressed"
    factored(tiny_llama(), bits_per_weight=2.0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {"folder": folder, "data": {"words": text_of(dense)}, "dense": dense}
