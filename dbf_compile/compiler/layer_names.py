"""What the layers of a graph are called in the options.

A graph knows a layer by its path from the frame that Dynamo captured: a block where blocks are compiled one by one or where
the graph breaks. Options name layers of a model. The model is the outermost module whose call is running and that holds
weights of the graph.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from dbf_compile.names import check_names, is_adapter, layer_names, plain_name, scope_of, unmatched
from dbf_compile.options import USUAL_PATTERNS, CompileOptions

_log = logging.getLogger(__name__)
_MODULES = inspect.getfile(nn.Module)


class NamedLayers(NamedTuple):
    """The layers of a graph, and the model that they are part of.

    Args:
        names: in the options, one per weight.
        adapters: whether each is an adapter of PEFT.
        model: the model; None where no call of one is running, as when a function is compiled.
    """

    names: tuple[str, ...]
    adapters: tuple[bool, ...]
    model: nn.Module | None


def named_layers(
    options: CompileOptions,
    ready: Iterable[str],
    weights: Sequence[Tensor],
    local: Sequence[str],
    check: bool = False,
) -> NamedLayers:
    """Return the names of layers in the options.

    Args:
        options: of the backend.
        ready: names of layers whose factors are ready.
        weights: real tensors; one per layer.
        local: the layers' names in the graph.
        check: raise for names in options that match no layer of the model.

    Raises:
        OptionError: names match nothing, or belong to one of several parts of a model.
    """
    keys = {"importance": list(options.importance), "checkpoint": list(ready)}
    patterns = {
        "skip": [pattern for pattern in options.skip if pattern not in USUAL_PATTERNS],
        "overrides": list(options.overrides),
    }
    model, paths = _paths_in_model(weights)
    raw = [
        _longest_match(paths.get(id(weight), []), name) for weight, name in zip(weights, local, strict=True)
    ]
    full = [plain_name(name) for name in raw]
    around = list(dict.fromkeys(full)) if model is None else layer_names(model)
    scope = scope_of(keys | patterns, around, _inner(full, local))
    known = [scope.name(name) for name in around]
    if check and weights:
        inside = {option: [key for key in names if scope.has(key)] for option, names in keys.items()}
        for option, names in (inside | patterns).items():
            if model is not None:
                check_names(option, names, known, type(getattr(model, "_orig_mod", model)).__name__)
            elif strangers := unmatched(names, known):
                _log.warning(
                    "%s: %s matches no layer of a compiled graph", option, ", ".join(map(repr, strangers))
                )
    beside = set(raw) if model is None else {name.rpartition(".")[0] for name, _ in _tensors(model)}
    adapters = tuple(is_adapter(name, beside) for name in raw)
    return NamedLayers(tuple(scope.name(name) for name in full), adapters, model)


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _paths_in_model(weights: Sequence[Tensor]) -> tuple[nn.Module | None, dict[int, list[str]]]:
    """Return the model, and paths of layers in it by the id of their weight."""
    ids, running = {id(weight) for weight in weights}, _running_modules()
    if not weights:
        return (running[0] if running else None), {}
    for module in running:
        paths: dict[int, list[str]] = {}
        for name, tensor in _tensors(module):
            if id(tensor) in ids:
                paths.setdefault(id(tensor), []).append(name.rpartition(".")[0])
        if paths:
            return module, paths
    return None, {}


def _running_modules() -> list[nn.Module]:
    """Return the modules whose calls are running in this thread, outermost first."""
    modules: dict[int, nn.Module] = {}
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        # Only of torch's own frames: looking at the variables of a frame keeps their values alive until it ends.
        if frame.f_code.co_filename == _MODULES:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                modules.setdefault(id(module), module)
    return list(modules.values())[::-1]


def _longest_match(paths: Sequence[str], local: str) -> str:
    """Return the path that a layer has in the graph; a tied weight has several."""
    return next((path for path in paths if _ends(path, local)), paths[0] if paths else local)


def _inner(full: Sequence[str], local: Sequence[str]) -> str:
    """Return the path of the captured frame's module within the model."""
    for name, end in zip(full, map(plain_name, local), strict=True):
        if _ends(name, end):
            return name[: len(name) - len(end)].rstrip(".")
    return ""


def _ends(path: str, end: str) -> bool:
    plain, end = plain_name(path), plain_name(end)
    return not end or plain == end or plain.endswith("." + end)
