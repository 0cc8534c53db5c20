"""Embeddings and heads: which layers of a model may read a table of quantized rows, and why others may not."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from dbf_compile.candidates.dense import is_conv1d, linears
from dbf_compile.candidates.reader import MAINTENANCE, SELF, read
from dbf_compile.candidates.reasons import reasons_against
from dbf_compile.candidates.references import held_elsewhere
from dbf_compile.candidates.sources import parameters
from dbf_compile.candidates.uses import weight_uses
from dbf_compile.names import plain_name
from dbf_compile.options import HEADS

# Smaller ones gain less than a megabyte: positions, types of tokens, vocabularies of characters.
MIN_WEIGHTS = 1 << 20


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return the embeddings of a model by name, in order; one with several names under the first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads of a model by name: what it says is one, reads the weight of an embedding, or is called like one."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    tables = {id(module._parameters.get("weight")) for module in embeddings(model).values()}
    return {
        name: module
        for name, module in linears(model).items()
        if module is head
        or id(module._parameters.get("weight")) in tables - {id(None)}
        or any(fnmatchcase(plain_name(name), pattern) for pattern in HEADS)
    }


def reasons_against_tables(model: nn.Module) -> dict[str, str]:
    """Return, for each embedding and head that must stay dense, the reason; by its first name."""
    linear = reasons_against(model)
    layers = embeddings(model)
    uses = held_elsewhere(model) | weight_uses(model) if layers else {}
    reasons = {name: linear[name] for name in heads(model) if name in linear}
    for name, module in heads(model).items():
        if is_conv1d(module):
            reasons.setdefault(name, "of the class Conv1D, whose weight is transposed")
    for name, module in layers.items():
        reason = uses.get(module) or why_no_table(module)
        if reason is not None:
            reasons[name] = reason
    return reasons


def why_no_table(module: nn.Embedding) -> str | None:
    """Return why an embedding may compute something else than rows of its weight, or None if it does as it says."""
    weight = module._parameters.get("weight")
    if "forward" in vars(module):
        return f"with a forward of {'accelerate' if hasattr(module, '_hf_hook') else 'its own'}"
    if weight is None:
        return "with a weight that is computed before every call"
    if type(weight) is not nn.Parameter:
        return f"with a weight of type {type(weight).__name__}"
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"with a weight of dtype {str(weight.dtype).removeprefix('torch.')} and shape {tuple(weight.shape)}"
    if module.max_norm is not None:
        return "with max_norm, which changes its weight as it reads it"
    kind: Any = type(module)
    return _use_in_class(kind)


@lru_cache(maxsize=256)
def _use_in_class(kind: Any) -> str | None:
    """Return where a subclass of ``nn.Embedding`` uses its own weight, other than by ``super().forward``; None if nowhere."""
    for cls in kind.__mro__[: kind.__mro__.index(nn.Embedding)]:
        for name, function in vars(cls).items():
            if not isinstance(function, FunctionType) or name in MAINTENANCE or name == "__init__":
                continue
            uses = read(function, kind, frozenset((own, SELF) for own in parameters(function)[:1])).uses
            if any(path == () for path, _ in uses):
                return f"whose weight is used in {function.__qualname__}"
    return None


def readers_of(model: nn.Module, names: Collection[str]) -> dict[int, list[str]]:
    """Return the names of the layers that hold each of the weights of ``names``, by the weight's id; "" for another module."""
    weights = {id(model.get_submodule(name)._parameters["weight"]) for name in names}
    known = {id(model.get_submodule(name)): name for name in names}
    readers: dict[int, list[str]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in weights:
                readers.setdefault(id(parameter), []).append(known.get(id(module), ""))
    return readers
