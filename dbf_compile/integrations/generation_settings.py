"""Settings of generation as transformers reads them, for a loop of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dbf_compile.options import Sampling

# Settings of generation that have no influence here, or that we read.
_SETTINGS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
_SETTINGS |= {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_SETTINGS |= {"max_length", "max_new_tokens", "num_beams", "use_cache", "early_stopping", "length_penalty"}
_DEFAULT_TOP_K = 50  # of transformers, where nothing else is said


class UnsuitedError(Exception):
    """The model does something that a step over our cache does not have; the message says what."""


def sampling_of(config: Any, sampling: Sampling, options: Mapping[str, Any]) -> tuple[Sampling, set[int]]:
    """Return how ``generate`` of transformers would choose tokens, and the tokens that end a text.

    Args:
        config: the model's settings of generation.
        sampling: those that are asked for; they win.
        options: further arguments of ``generate``.

    Raises:
        UnsuitedError: settings or options that a step over our cache does not have.
    """
    active = {name for name, value in config.to_diff_dict().items() if value}  # what is off is no setting
    unknown = sorted((set(options) - {"eos_token_id", "pad_token_id"}) | (active - _SETTINGS))
    if unknown:
        raise UnsuitedError(f"the settings {', '.join(unknown)}")
    own = {
        name: getattr(config, name, None)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if getattr(sampling, name) is None
    }
    if not sampling.do_sample:
        own = {"repetition_penalty": own["repetition_penalty"]} if "repetition_penalty" in own else {}
    elif "top_k" in own:
        own["top_k"] = _DEFAULT_TOP_K if own["top_k"] is None else own["top_k"]
    ends = options.get("eos_token_id", config.eos_token_id)
    ends = [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]
    return replace(sampling, **own), {int(token) for token in ends}
