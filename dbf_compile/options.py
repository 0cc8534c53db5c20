"""Options: what a user may set, checked once, at the door.

``CompressionConfig`` says how weights become factors, ``CompileOptions`` adds what the compiler needs, and
``CompressOptions`` what the compression of a whole model needs. All come from plain dictionaries through :func:`parse`,
which refuses unknown keys and wrong types.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from dbf_compile.errors import OptionError

# Heads and embeddings are a large part of small models and lose most; users expect them untouched.
DENSE_BY_DEFAULT = ("*lm_head", "*embed_out", "*predictions.decoder", "*output_projection", "*proj_out")
MIN_BITS, MAX_BITS = 0.05, 16.0
ACCURACIES = ("exact", "fast")
MODES, BUDGETS = ("auto", "independent", "block"), ("equal", "allocated")
PRESETS = {"fast": 250, "balanced": 600, "best": 6000}  # iterations of the factorizer


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How dense weights become factors.

    Args:
        bits_per_weight: stored bits per weight of every layer, scales and padding counted; 0.05 to 16.
        overrides: bits per weight for layers whose name matches a pattern (``fnmatch``); the first match wins.
        skip: name patterns of layers that stay dense.
        merge_shared_inputs: factor layers that read one input (q/k/v, gate/up) as one stacked weight.
        preset: "fast", "balanced" or "best": how long the factorizer searches, about 1 : 2.4 : 24.
        iterations: iterations of the factorizer; None for those of the preset.
        seed: seed of the start; equal seeds give equal factors.
        cache_dir: folder of the factor cache; None for the user's cache folder.
        progress: show a progress bar while factoring.
    """

    bits_per_weight: float = 2.0
    overrides: Mapping[str, float] = field(default_factory=dict)
    skip: tuple[str, ...] = DENSE_BY_DEFAULT
    merge_shared_inputs: bool = True
    preset: str = "balanced"
    iterations: int | None = None
    seed: int = 0
    cache_dir: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, bits in (("bits_per_weight", self.bits_per_weight), *self.overrides.items()):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise OptionError(
                    f"{bits} bits per weight for {name!r}",
                    f"{MIN_BITS} to {MAX_BITS}",
                    "use 2.0 for quality near dense, 1.0 for size",
                )
        if self.preset not in PRESETS:
            raise OptionError(
                f"preset={self.preset!r}", ", ".join(map(repr, PRESETS)), "leave it out for 'balanced'"
            )
        if self.iterations is not None and self.iterations < 1:
            raise OptionError(f"iterations={self.iterations}", "1 or more", "leave it out and set preset")

    def bits_for(self, name: str) -> float:
        """Return the bits per weight wanted for the layer ``name``."""
        override = self.override_for(name)
        return self.bits_per_weight if override is None else override

    def override_for(self, name: str) -> float | None:
        """Return the bits per weight of the first override that matches the layer ``name``, or None."""
        return next((bits for pattern, bits in self.overrides.items() if fnmatchcase(name, pattern)), None)

    def skips(self, name: str) -> bool:
        """Return whether the layer ``name`` stays dense."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)


@dataclass(frozen=True, kw_only=True)
class CompressOptions(CompressionConfig):
    """What ``compress(model, output, bits=..., ...)`` takes.

    Args:
        mode: "independent": statistics once, then every weight on its own. "block": block after block, with inputs from
            the compressed prefix and targets from the dense model. "auto": "block" where there is data.
        length, windows: tokens of a window of text, and how many windows to calibrate and train with.
        holdout: windows after those to judge by; 0 to judge nothing.
        form: of importance: "diagonal", "input" or "kronecker"; see ``calibrate``.
        temper: power of the spectrum of importances; None to take them as they are, 0.5 is a usual value.
        budget: "equal" bits for all weights, or "allocated" by measured error curves.
        tune: epochs in which the still dense weights of a block are tuned before a weight is factored ("block").
        refine: epochs in which signs and scales of a block are refined at its end ("block").
        distill: epochs in which scales learn the logits of the dense model at the end; 0 switches a stage off.
        max_shard_size: bytes of a weight file.
    """

    mode: str = "auto"
    length: int = 512
    windows: int = 64
    holdout: int = 8
    form: str = "diagonal"
    temper: float | None = None
    budget: str = "equal"
    tune: int = 4
    refine: int = 4
    distill: int = 4
    max_shard_size: int = 2 * 10**9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("mode", MODES), ("budget", BUDGETS)):
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"{name}={getattr(self, name)!r}", ", ".join(map(repr, allowed)), f"leave {name} out"
                )
        lowest = {"length": 2, "windows": 1, "holdout": 0, "tune": 0, "refine": 0, "distill": 0}
        for name, low in (*lowest.items(), ("max_shard_size", 1)):
            if getattr(self, name) < low:
                raise OptionError(f"{name}={getattr(self, name)}", f"{low} or more", f"leave {name} out")
        if self.temper is not None and not 0 <= self.temper <= 1:
            raise OptionError(f"temper={self.temper}", "0 to 1, or None", "0.5 is a usual value")


@dataclass(frozen=True, kw_only=True)
class CompileOptions(CompressionConfig):
    """What ``torch.compile(model, backend="dbf", options={...})`` takes.

    Args:
        importance: layer name to ``Importance``; layers not named count all entries alike.
        checkpoint: path of ready factors; layers that it holds are not factored.
        accuracy: "exact" for sums as exact as float32 ones, "fast" to allow CPU kernels a relative error of 1e-4.
        mode: mode of Inductor, such as "reduce-overhead"; ``torch.compile`` takes ``mode`` or ``options``, not both.
        inductor: settings of Inductor for this compilation only.
    """

    importance: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    accuracy: str = "exact"
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accuracy not in ACCURACIES:
            raise OptionError(
                f"accuracy={self.accuracy!r}",
                " or ".join(map(repr, ACCURACIES)),
                "leave it out for 'exact'",
            )


_Config = TypeVar("_Config", bound=CompressionConfig)

_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    "float | None": ("a number or None", lambda v: v is None or _CHECKS["float"][1](v)),
    "int": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "int | None": (
        "a whole number or None",
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool)),
    ),
    "bool": ("True or False", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "str | None": ("a string, a path or None", lambda v: v is None or isinstance(v, (str, Path))),
    "tuple[str, ...]": (
        "a list of name patterns",
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(item, str) for item in v),
    ),
    "Mapping[str, float]": (
        "a dictionary from name pattern to number",
        lambda v: (
            isinstance(v, Mapping)
            and all(isinstance(k, str) and _CHECKS["float"][1](n) for k, n in v.items())
        ),
    ),
    "Mapping[str, Any]": (
        "a dictionary with string keys",
        lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v),
    ),
}


def parse(kind: type[_Config], given: Mapping[str, Any]) -> _Config:
    """Build a configuration from a dictionary and refuse what it does not know.

    Args:
        kind: CompressionConfig or one that extends it.
        given: option name to value.

    Raises:
        OptionError: an unknown key (the known ones are listed), a value of the wrong type or range.
    """
    types = {item.name: str(item.type) for item in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in types:
            close = difflib.get_close_matches(str(name), types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise OptionError(f"unknown option {name!r}", ", ".join(sorted(types)), hint)
        allowed, check = _CHECKS[types[name]]
        if not check(value):
            raise OptionError(f"option {name}={value!r}", allowed, f"pass {name} as {allowed}")
        if types[name] == "str | None" and value is not None:
            value = str(value)
        values[name] = tuple(value) if types[name] == "tuple[str, ...]" else value
    return kind(**values)
