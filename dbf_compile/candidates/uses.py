"""Uses of weights without a call and tests of classes, in a whole model.

The classes of all modules are read once each; what they use is looked up in every module. Where a source cannot be read, calls
are assumed: then the stand-in itself raises, when its weight is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from dbf_compile.candidates.reader import BELOW, CHILD, MAINTENANCE, OUTSIDE, SELF, Path, Test, Uses, read
from dbf_compile.candidates.sources import mentions, methods, own_function, parameters

# They read weights on a fast path, and leave it where a weight has a __torch_function__, as that of a stand-in.
_DECLINE = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.")


def weight_uses(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules whose ``weight`` is used without a call or whose class is tested, and the reason in words."""
    used_in: dict[nn.Module, str] = {}
    modules = [m for m in model.modules() if type(m) not in _DECLINE and not _only_wraps(m)]
    parents = [module for module in modules if module._modules]
    names = _reachable({type(module) for module in parents if not _is_of_peft(module)})
    for module in modules:
        kind: Any = type(module)
        called = (
            frozenset({"forward"}) if _is_of_peft(module) else names
        )  # its other methods care for adapters
        uses = {**(_uses_in_class(kind, called) if module._modules else {}), **_uses_of_own(module)}
        for (path, tests), where in uses.items():
            if all(_may_be(module, test) for test in tests):
                for used in _resolve(module, path):
                    used_in.setdefault(used, where)
    return used_in


@lru_cache(maxsize=2**10)
def _uses_in_class(kind: Any, names: frozenset[str]) -> Uses:
    """Return the uses in those methods of a class that have one of ``names``."""
    uses: Uses = {}
    for name in sorted(names - MAINTENANCE):
        for function in methods(kind, name, OUTSIDE):
            uses |= read(function, kind, frozenset((own, SELF) for own in parameters(function)[:1])).uses
    return uses


def _uses_of_own(module: nn.Module) -> Uses:
    """Return the uses in hooks of a module, and in a ``forward`` that it alone has."""
    has_forward = "forward" in vars(module) and module._modules
    callables = [(vars(module)["forward"], False)] if has_forward else []
    callables += [
        (hook, True) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    uses: Uses = {}
    kind: Any = type(module)
    for value, is_hook in callables:
        own = own_function(value, module, is_hook)
        if own is not None:
            uses |= read(own[0], kind, frozenset((name, SELF) for name in own[1])).uses
    return uses


def _only_wraps(module: nn.Module) -> bool:
    """Return whether a module calls a model, and keeps its parameters in order; PEFT's compute beside a ``base_layer``."""
    where = type(module).__module__
    if where.startswith(_WRAPPERS) or "_orig_mod" in module._modules:
        return True
    return _is_of_peft(module) and "base_layer" not in module._modules


def _is_of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _reachable(kinds: Iterable[type]) -> frozenset[str]:
    """Return the names of methods that ``forward`` of one of the classes may call, of itself or of another module."""
    defined = {name for kind in kinds for cls in kind.__mro__ if cls not in OUTSIDE for name in vars(cls)}
    names, added = set[str](), {"forward"}
    while added:
        names |= added
        functions = [fn for kind in kinds for name in added for fn in methods(kind, name, OUTSIDE)]
        added = {name for fn in functions for name in mentions(fn)} & defined - names - MAINTENANCE
    return frozenset(names)


def _may_be(module: nn.Module, test: Test) -> bool:
    """Return whether a test may come out as it must; what cannot be asked may."""
    try:
        return bool(eval(test[0], {"__builtins__": {}})(module)) == test[1]
    except Exception:  # an attribute that is set later
        return True


def _resolve(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Yield the modules at a path."""
    if not path:
        yield module
        return
    part, rest = path[0], path[1:]
    following: Iterable[object]
    if part == CHILD:
        following = module.children()
    elif part == BELOW:
        following = module.modules()
    else:
        following = _members(module, part)
        if rest[:1] == (CHILD,) and not isinstance(getattr(module, part, None), nn.Module):
            rest = rest[1:]
    for member in following:
        if isinstance(member, nn.Module):
            yield from _resolve(member, rest)


def _members(module: nn.Module, name: str) -> list[object]:
    """Return the module of that name, or those in a plain list or dictionary of that name."""
    try:
        value = getattr(module, name, None)
    except Exception:  # a property that cannot be asked now
        return []
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]
