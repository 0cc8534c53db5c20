"""What a GGUF file says of positions, of its vocabulary and of generation, and transformers does not read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from dbf_compile.errors import ConversionError
from dbf_compile.integrations.gguf_header import Header

ROPE_FACTORS = "rope_freqs.weight"
# Of Llama 3.1 and later; the factor itself is the largest of those in the file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOLERANCE = 1e-4  # of a frequency; factors are float32
# "tokenizer.ggml.pre" of vocabularies that split off every digit, and else split as GPT-2 does (llama.cpp, llama-vocab.cpp).
_SINGLE_DIGITS = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_AS_GPT2 = ("default", "gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "gpt2")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def adapt_config_(config: Any, path: Path, header: Header, factors: Tensor | None) -> None:
    """Give a configuration the stretched positions of a file, in place.

    Args:
        config: of transformers, as it reads the file.
        path, header: of the file.
        factors: those that the file divides rotary frequencies by, or None.

    Raises:
        ConversionError: positions are stretched in another way.
    """
    rope = getattr(config, "rope_parameters", None)
    is_plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if factors is not None and isinstance(rope, dict) and is_plain:
        rope |= {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    kind = header.of_model("rope.scaling.type", "none")
    if kind != "none" and is_plain and factors is None:
        raise _stretched(path, f"rope.scaling.type = {kind!r}")


def check_rope(path: Path, model: Any, factors: Tensor | None) -> None:
    """Compare the rotary frequencies of a model with those of its file.

    Raises:
        ConversionError: they differ.
    """
    if factors is None:
        return
    rope = model.config.rope_parameters
    steps = torch.arange(len(factors), dtype=torch.float32) / len(factors)
    stored = rope["rope_theta"] ** -steps / factors
    frequencies = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    if not frequencies or any(
        buffer.shape != stored.shape or not torch.allclose(buffer, stored, rtol=_TOLERANCE, atol=0)
        for buffer in frequencies
    ):
        raise _stretched(path, f"{ROPE_FACTORS} other than those of Llama 3")


def _stretched(path: Path, what: str) -> ConversionError:
    return ConversionError(
        f"{path} with positions stretched in a way that transformers does not read ({what})",
        "plain rotary positions, or those of Llama 3",
        "compress the model that the file was made from: its folder, or its name on the Hub",
    )


def adapt_tokenizer_(tokenizer: Any, path: Path, header: Header) -> Any:
    """Make a tokenizer split text as the file says, in place, and return it."""
    kind, splitting = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or splitting is None or splitting in _AS_GPT2:
        return tokenizer
    if splitting in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif splitting not in _known_to_transformers():
        warnings.warn(
            f"{path} splits text as {splitting!r}, which is not known here: its text is split as GPT-2 does. "
            "Compare tokens with the original tokenizer, and pass that if they differ",
            stacklevel=2,
        )
    return tokenizer


def _known_to_transformers() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # older ones know none
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def generation_settings(header: Header) -> dict[str, Any]:
    """Return fields of a generation configuration: all tokens at which an answer ends, and how tokens are drawn."""
    settings: dict[str, Any] = {}
    ends = [header.metadata.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    drawing = {
        ours: header.metadata[f"general.sampling.{name}"]
        for name, ours in _SAMPLING.items()
        if f"general.sampling.{name}" in header.metadata
    }
    return settings | drawing | ({"do_sample": True} if drawing else {})
