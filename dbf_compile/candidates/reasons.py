"""Why linear layers of a model must stay dense, whatever the options say; and how the user is told."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy

from dbf_compile.candidates.dense import linears, why_not_dense
from dbf_compile.candidates.references import held_elsewhere
from dbf_compile.candidates.uses import weight_uses
from dbf_compile.names import is_adapter

_log = logging.getLogger(__name__)

# Said of themselves in the documents: a layer that stays dense by one of these rules is no surprise.
_ADAPTER = "an adapter of PEFT"
_BY_RULE = (
    "skipped by name",
    "too small to gain",
    "an adapter",
    "the model's head",
    "an embedding",
    "that an embedding reads, too",
    "a table of",
)
# Modules that multiply by matrices of their own.
_WITH_MATRICES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_MATRIX = 16  # rows and columns of a matrix that is worth a word
# Where PEFT's modules keep what they adapt; all else below them is theirs.
_ADAPTED = ("base_layer", "base_model", "model")


def reasons_against(model: nn.Module) -> dict[str, str]:
    """Return, for each linear layer of a model that cannot be factored, the reason; by its first name."""
    layers = linears(model)
    adapters = _adapters(model)
    uses = held_elsewhere(model) | weight_uses(model) if layers else {}
    names = {name for name, _ in model.named_modules()}
    reasons: dict[str, str] = {}
    for name, module in layers.items():
        reason = adapters.get(module, _ADAPTER if is_adapter(name, names) else None)
        if reason is None and module in uses:
            reason = uses[module]
        reason = reason or why_not_dense(module)
        if reason is not None:
            reasons[name] = reason
    return reasons


def reasons_to_stay_dense(model: nn.Module, heads: Collection[str] = ()) -> dict[str, str]:
    """Return, for each linear layer of a model that is not factored unasked, the reason; by its first name.

    Besides those that cannot be factored these are layers whose weight would have to be kept for another one, and the head.

    Args:
        model: any module.
        heads: names of heads that are factored, also where an embedding reads their weight.
    """
    readers = _readers(model)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    reasons = reasons_against(model)
    for name, module in linears(model).items():
        if name in reasons or name in heads:
            continue
        others = [other for other in readers[id(module._parameters["weight"])] if other is not module]
        if any(isinstance(other, nn.Embedding) for other in others):
            reasons[name] = "that an embedding reads, too"
        elif others:
            reasons[name] = "tied to another layer"
        elif module is head:
            reasons[name] = "the model's head"
    return reasons


def other_matrices(model: nn.Module) -> dict[str, str]:
    """Return names of parameters that linear layers would have if they were modules of their own, and where they are."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter):
                continue
            rows = min(parameter.shape[-2:], default=0)
            if isinstance(module, _WITH_MATRICES) and parameter.dim() > 1:
                reasons[f"{name}.{kind}".lstrip(".")] = f"in {type(module).__name__}"
            elif parameter.dim() == 3 and len(parameter) > 1 and rows >= _MATRIX and _stores_experts(module):
                reasons[f"{name}.{kind}".lstrip(".")] = "of experts in one tensor; see linearize_experts_"
    return reasons


def _stores_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower() or hasattr(module, "is_transposed")


def _readers(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that hold each parameter, by its id."""
    readers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            readers.setdefault(id(parameter), []).append(module)
    return readers


def _adapters(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that PEFT added, and layers whose weight its adapters read, with the reason."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if type(module).__module__.startswith("peft."):
            added = [child for name, child in module.named_children() if name not in _ADAPTED]
            reasons |= {below: _ADAPTER for child in added for below in child.modules()}
            if any(dict(getattr(module, "use_dora", {})).values()):
                reasons[module._modules["base_layer"]] = "whose weight DoRA reads"  # type: ignore[index]
    return reasons


def listed(dense: Mapping[str, str]) -> str:
    """Return the reasons of layers, each with the number of its layers and the first of their names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in dense.items():
        by_reason.setdefault(reason, []).append(name or "the model itself")
    parts = []
    for reason, names in by_reason.items():
        parts.append(f"{len(names)} {reason} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    return "; ".join(parts)


def is_by_rule(reason: str) -> bool:
    """Return whether the documents say of a reason that such layers stay dense."""
    return reason.startswith(_BY_RULE)


_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def say_once(model: nn.Module, message: str, level: int) -> None:
    """Log a message about a model, once."""
    told = _told.setdefault(getattr(model, "_orig_mod", model), set())
    if message not in told:
        told.add(message)
        _log.log(level, "%s", message)


def left_dense(model: nn.Module | None, factored: int, dense: Mapping[str, str]) -> str:
    """Return in words how many linear layers are factored, and why others are not.

    Args:
        model: that has the layers; None for a function.
        factored: number of layers that are factored.
        dense: names of the other linear layers to their reasons.
    """
    title = "a function" if model is None else type(getattr(model, "_orig_mod", model)).__name__
    total = factored + len(dense)
    return f"{factored} of {total} linear layers of {title} are factored; left dense: {listed(dense)}"


def tell_left_dense(model: nn.Module, factored: int, dense: Mapping[str, str]) -> None:
    """Log which layers stay dense: as a warning if that is less than was asked for, once for a model and reasons.

    Args:
        model: the model.
        factored: number of layers that are factored.
        dense: names of the other linear layers to their reasons.
    """
    if dense:
        expected = all(map(is_by_rule, dense.values()))
        say_once(model, left_dense(model, factored, dense), logging.INFO if expected else logging.WARNING)
