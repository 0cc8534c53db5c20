"""Names of layers: those of options must match layers of the model, whatever is wrapped around it or left out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dbf_compile.errors import OptionError

# Components that torch.compile, FSDP, activation checkpointing and PEFT put into the name of a layer that they wrap.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")


def plain_name(name: str) -> str:
    """Return the name that a layer or tensor has without the wrappers of torch and PEFT around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def layer_names(model: nn.Module) -> list[str]:
    """Return the plain names of all modules that hold parameters or buffers themselves."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return list(dict.fromkeys(plain_name(name.rpartition(".")[0]) for name, _ in tensors))


def is_adapter(name: str, names: Collection[str]) -> bool:
    """Return whether a layer is an adapter: it stands beside a ``base_layer``, as PEFT's do.

    Args:
        name: of the layer.
        names: of the layers around it, with those of wrappers.
    """
    parts = name.split(".")
    owners = (".".join(parts[:end]) for end in range(1, len(parts)) if parts[end] != "base_layer")
    return any(f"{owner}.base_layer" in names for owner in owners)


def unmatched(patterns: Iterable[str], layers: Collection[str]) -> list[str]:
    """Return the names and patterns (``fnmatch``) that match none of ``layers``."""
    known = set(layers)
    return [
        pattern
        for pattern in patterns
        if pattern not in known and not any(fnmatchcase(layer, pattern) for layer in layers)
    ]


def check_names(option: str, patterns: Iterable[str], layers: Collection[str], model: str) -> None:
    """Raise unless all names and patterns of an option match layers of the model.

    Args:
        option: its name.
        patterns: names of layers, or patterns of them (``fnmatch``).
        layers: names of the model's layers.
        model: what the message calls the model.

    Raises:
        OptionError: one matches nothing; the message has the nearest names.
    """
    strangers = unmatched(patterns, layers)
    if strangers:
        nearest = sorted(layers, key=lambda layer: -_likeness(strangers[0], layer))[:3]
        raise OptionError(
            f"{option}: {', '.join(map(repr, strangers[:5]))} matches no layer of {model}",
            f"names of its layers, such as {', '.join(map(repr, nearest)) or 'none: it has no layers'}",
            "correct the name or leave it out; a pattern must match a whole name, as '*.up_proj' does",
        )


def _likeness(pattern: str, layer: str) -> float:
    bare = pattern.replace("*", "")
    pairs = (bare, layer), (bare.rpartition(".")[2], layer.rpartition(".")[2])
    return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs)


@dataclass(frozen=True)
class Scope:
    """Where names of options start: the module that they are relative to.

    Args:
        removed: path of that module within the model.
        added: path of the model within that module.
    """

    removed: str = ""
    added: str = ""

    def name(self, layer: str) -> str:
        """Return the name in options of a layer of the model."""
        if self.removed and (layer + ".").startswith(self.removed + "."):
            layer = layer[len(self.removed) + 1 :]
        return ".".join(part for part in (self.added, layer) if part)

    def has(self, name: str) -> bool:
        """Return whether a name of the options may be that of a layer of the model: a part knows nothing of others."""
        return not self.added or (name + ".").startswith(self.added + ".")


def scope_of(
    options: Mapping[str, Mapping[str, Any] | Iterable[str]],
    layers: Collection[str],
    inner: str = "",
    exact: Collection[str] = ("importance", "checkpoint", "factors"),
) -> Scope:
    """Return where the names of options start: at the model, at a part of it, or at a model that it is a part of.

    Statistics are measured on a model that is wrapped later (DDP, PEFT, a module of the user), or of which a part is
    compiled. Of all modules that names can start at, the one is right in which most of them name a layer; of equals the
    outermost.

    Args:
        options: option to its names.
        layers: names of the model's layers.
        inner: path of the part that is compiled.
        exact: options that hold names of layers; those of others are patterns.

    Raises:
        OptionError: the layers' names end names of several parts of the measured model.
    """
    keys = {key for option, names in options.items() if option in exact for key in names}
    patterns = [pattern for option, names in options.items() if option not in exact for pattern in names]
    within: dict[str, set[str]] = {"": set(layers)}  # path of a module to the names relative to it
    for layer in layers:
        parts = layer.split(".")
        for end in range(1, len(parts)):
            within.setdefault(".".join(parts[:end]), set()).add(".".join(parts[end:]))
    if keys:
        scores = {path: len(keys & names) for path, names in within.items()}
        best = max(scores, key=lambda path: (scores[path], path == "", path == inner, -path.count(".")))
        if not scores[best]:
            return Scope(added=_added(keys, layers))
        rivals = [path for path in scores if scores[path] == scores[best] and not _nested(path, best)]
        if rivals and best != inner:
            raise _ambiguous(sorted(keys), sorted({best, *rivals}))
        return Scope(removed=best)
    # A pattern such as "*" matches anywhere: only wrappers around all layers, and the compiled part, come into question.
    starts = [path for path in within if len(within[path]) == len(within[""]) or path == inner]
    if not patterns or not starts:
        return Scope()
    return Scope(removed=min(starts, key=lambda path: (len(unmatched(patterns, within[path])), len(path))))


def _nested(path: str, other: str) -> bool:
    return (path + ".").startswith(other + ".") or (other + ".").startswith(path + ".") or "" in (path, other)


def _added(keys: Collection[str], layers: Collection[str]) -> str:
    paths = Counter(key[: -len(layer) - 1] for layer in layers for key in keys if key.endswith("." + layer))
    best = [path for path, count in paths.items() if count == max(paths.values())]
    if len(best) > 1:
        raise _ambiguous(sorted(layers), sorted(best))
    return best[0] if best else ""


def _ambiguous(names: Collection[str], paths: Collection[str]) -> OptionError:
    layers, parts = (", ".join(map(repr, list(items)[:3])) for items in (names, paths))
    return OptionError(
        f"layers {layers}, which could belong to any of {parts}",
        "names that belong to one part of a model",
        "pass what belongs to this part, under its own names, or call the part through its model",
    )
