"""Layers that a model holds outside of its modules as well: in lists, closures, bound methods, partial functions.

Whoever replaces a layer replaces it among the modules. Such a reference would go on calling the dense one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_DEEPEST = 4
# What nn.Module keeps of its own. Hooks are read as sources; children and tensors are the model itself.
_OWN = set(vars(nn.Module()))


def held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that are held outside of ``_modules``, themselves or their weight, and the reason in words."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        owners[id(module)] = module
        owners |= {
            id(parameter): module for parameter in module._parameters.values() if parameter is not None
        }
    held: dict[nn.Module, str] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in _OWN or name == "_compiled_call_impl":
                continue
            for inner in _inside(value, owners, _DEEPEST):
                owner = owners[id(inner)]
                if owner is not module:
                    held.setdefault(
                        owner, f"that {type(module).__name__}.{name} holds outside of its modules"
                    )
    return held


def _inside(value: Any, wanted: Mapping[int, object], depth: int) -> Iterator[object]:
    """Yield the objects of ``wanted``, by their id, that a value holds."""
    if id(value) in wanted:
        yield value
    elif depth:
        for part in _parts(value):
            yield from _inside(part, wanted, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    match value:
        case dict():
            yield from value.values()
        case list() | tuple() | set():
            yield from value
        case partial():
            yield from (value.func, *value.args, *value.keywords.values())
        case MethodType():
            yield value.__self__
        case FunctionType():
            yield from map(_content, value.__closure__ or ())
            yield from value.__defaults__ or ()


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
