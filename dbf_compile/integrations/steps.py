"""One step of decoding with models of transformers: tokens at any positions, over a cache that we lay out ourselves.

A row of a batch may stand at any position, so neither prompts of several lengths nor a prompt read in parts needs padding or
masks: every query reads the keys up to its own position. The model's attention is exchanged for ``dbf::cached_attention``
through the interface that transformers has for it; all else is the model's own code.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dbf_compile.attention_ops import empty_cache
from dbf_compile.errors import first_line
from dbf_compile.integrations.generation_settings import UnsuitedError

ATTENTION = "dbf_cached"
# Layers that attend to all, or to the last, tokens before them. Others keep a state of their own.
_KINDS = {"full_attention", "sliding_attention"}
# What models pass to their attention beside its operands, and does not change the result here.
_IGNORED = {"position_ids", "use_cache", "cache_position", "dropout", "is_causal", "return_dict"}


class StepCache(transformers.Cache):
    """The cache as a model's code sees it within one step: keys [B, H, D, L], values [B, H, L, V] of every layer.

    Args:
        keys: of every layer; written in place.
        values: of every layer; written in place.
        positions: of the tokens of this step, int64 [B, T].
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor) -> None:
        # Not that of the base class, which makes layers of its own.
        self.layers: list[Any] = []
        self._keys, self._values, self._positions = keys, values, positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write what the step adds, [B, H, T, D] and [B, H, T, V], and return the whole cache of a layer."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
        heads = torch.arange(keys.shape[1], device=keys.device)[None, :, None]
        positions = self._positions[:, None, :]
        keys.transpose(2, 3)[rows, heads, positions] = key_states
        values[rows, heads, positions] = value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are passed to the model."""
        return 0


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend over a cache, as transformers calls it; in place of a mask there are positions [B, 1, T, 1]."""
    window, cap = others.pop("sliding_window", None) or 0, others.pop("softcap", None) or 0.0
    unknown = sorted(
        name
        for name, value in others.items()
        if name not in _IGNORED and value is not None and value is not False
    )
    if unknown or attention_mask is None:
        raise UnsuitedError(f"attention with {', '.join(unknown) or 'a mask of its own'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    positions = attention_mask[:, 0, :, 0]
    y = torch.ops.dbf.cached_attention(query, key, value, positions, scale, window, cap)
    return y, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, cached_attention)


def step(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    last: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """Run a model on tokens and extend the cache in place.

    Args:
        model: with the attention ``ATTENTION``.
        tokens: int64 [B, T].
        positions: of the tokens, int64 [B, T].
        last: index of the token whose logits are returned, int64 [1].
        keys: of every layer [B, H, D, L].
        values: of every layer [B, H, L, V].

    Returns:
        float32 logits [B, vocabulary].
    """
    cache = StepCache(keys, values, positions)
    output = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=positions[:, None, :, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


@contextmanager
def our_attention(model: nn.Module) -> Iterator[None]:
    """Give a model our attention within the block."""
    configs = {id(config): config for module in model.modules() if (config := _config_of(module)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if isinstance(config, transformers.PreTrainedConfig) else None


def why_unsuited(model: Any) -> str | None:
    """Return why a model needs ``generate`` of transformers, in words, or None."""
    if not isinstance(model, transformers.PreTrainedModel) or not model._supports_attention_backend:
        return "its attention is its own"
    if not {"position_ids", "past_key_values", "logits_to_keep"} <= set(
        inspect.signature(model.forward).parameters
    ):
        return "its forward takes no positions of tokens, or returns all logits"
    if model.device.type != "cpu":
        return "it is on a device where transformers' own way is as fast"
    config = model.config.get_text_config(decoder=True)
    if set(getattr(config, "layer_types", None) or ()) - _KINDS:
        return "it has layers that keep a state of their own"
    if {"dynamic", "longrope"} & set(re.findall(r"\w+", str(getattr(config, "rope_parameters", "")))):
        return "its rotary embedding depends on the length of the text"
    if model.config.is_encoder_decoder or model._is_stateful:
        return "it keeps more than keys and values"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "it has hooks"
    return None


_PROBE = 6  # tokens


def probe(model: Any) -> list[tuple[int, int, int, torch.dtype]]:
    """Return heads, features of keys, features of values and dtype of every layer's cache.

    The model reads a few tokens as transformers runs it, and over our cache in two parts; both must agree. So a model that
    uses its cache or its attention in a way that is not ours is told from one that does not, whatever its architecture.

    Raises:
        UnsuitedError: it does not fit.
    """
    reason = why_unsuited(model)
    if reason is not None:
        raise UnsuitedError(reason)
    device = model.device
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = (torch.arange(_PROBE, device=device) * 7 + 3)[None] % vocabulary
    positions = torch.arange(_PROBE, device=device)[None]
    try:
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            expected = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1].float()
        sizes = [
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype)
            for layer in cache.layers
        ]
        keys, values = empty_cache(sizes, 1, 2 * _PROBE, device)
        with torch.no_grad(), our_attention(model):
            for part in (slice(0, _PROBE - 2), slice(_PROBE - 2, _PROBE)):
                at = positions[:, part]
                last = torch.tensor([at.shape[1] - 1], device=device)
                logits = step(model, tokens[:, part], at, last, keys, values)
    except UnsuitedError:
        raise
    except Exception as error:  # whatever the code of a model does with what it does not expect
        raise UnsuitedError(f"its code does not take our cache ({first_line(error)})") from error
    # Numbers of 16 bits are rounded elsewhere; a mask or positions that are not those expected change all of the result.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.2
    if not (logits - expected).norm() <= tolerance * expected.norm():
        raise UnsuitedError("over our cache it computes something else")
    return sizes


def fingerprint(model: Any) -> str:
    """Return a hash of all that the code of a step depends on: configuration, classes, tensors' shapes, strides and dtypes."""
    config = json.loads(model.config.to_json_string(use_diff=False), object_hook=_without_place)
    digest = hashlib.sha256(f"{transformers.__version__} {json.dumps(config, sort_keys=True)}".encode())
    names = sorted({f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()})
    digest.update(" ".join(names).encode())
    digest.update(inspect.getsource(inspect.getmodule(type(model)) or type(model)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}".encode())
    return digest.hexdigest()


def _without_place(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the folder that it comes from, so that a copy of a folder has the same programs."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


_NO_TOKEN = 2**31 - 1  # of any vocabulary; below 0 transformers warns that it may crash


def generate_by(model: Any, first: Tensor, count: int, choose: Callable[[Tensor], Tensor]) -> None:
    """Run ``generate`` of transformers, which knows all models, with tokens that are chosen elsewhere.

    Args:
        model: one that generates.
        first: of every row the first token, int64 [B, 1].
        count: tokens that follow.
        choose: of logits [B, vocabulary] the next tokens, int64 [B, 1].
    """
    first = first.to(model.get_input_embeddings().weight.device)

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(1, choose(scores).to(scores.device), 0.0)

    model.generate(
        input_ids=first,
        attention_mask=torch.ones_like(first),
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
        eos_token_id=_NO_TOKEN,  # it stops at none
        pad_token_id=0,
        disable_compile=True,
        logits_processor=[process],
    )
