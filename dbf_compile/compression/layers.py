"""From the dense linear layers of a model to factors.

Layers that read one input (q/k/v, gate/up) are stacked and factored as one weight: they share the first stage,
which costs one product instead of several, and a taller matrix loses less at equal bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Self, Unpack

from torch import Tensor, nn

from dbf_compile import checkpoint
from dbf_compile.candidates.reasons import listed, other_matrices, reasons_to_stay_dense, tell_left_dense
from dbf_compile.candidates.tables import heads
from dbf_compile.compression.budgets import Allocation
from dbf_compile.compression.cache import CachedStore, FactorCache, importance_hash
from dbf_compile.compression.jobs import FactorJob, joined, run_jobs
from dbf_compile.compression.tables import make_tables
from dbf_compile.errors import ConversionError
from dbf_compile.factorizer.factorize import FactorizerConfig
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors, mid_features_for
from dbf_compile.keywords import CompressionKeywords
from dbf_compile.linear import dense_linears, dense_weight, swap_
from dbf_compile.names import Scope, check_names, layer_names, plain_name, scope_of
from dbf_compile.options import HEADS, PRESETS, USUAL_PATTERNS, CompressionConfig
from dbf_compile.records import resolve
from dbf_compile.tables import QuantizedRows, swap_tables_

# Below this the 16-bit scales take most of the bits and the product approximates nothing.
MIN_MID_FEATURES = 8

# Names of layers of one parent that read the same input, in the architectures of transformers.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


_AND = joined(["", ""])  # between names of layers that are factored as one


class LayerFactorizer:
    """Decides which layers are factored, which of them together, and how.

    Args:
        config: bits, overrides, skips and settings of the factorizer.
        importance: layer name to second moments, as made by ``calibrate``.
        ready: path of a checkpoint; the layers in it are not factored again.
        allocation: the middle dimension R of every weight that no override names; None to give all layers their bits.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        config: CompressionConfig,
        importance: Mapping[str, Importance] | None = None,
        ready: str | Path | None = None,
        allocation: Allocation | Mapping[str, int] | None = None,
    ) -> None:
        sizes = allocation.mid_features if isinstance(allocation, Allocation) else allocation
        self._mid_features = None if sizes is None else {_plain(names): size for names, size in sizes.items()}
        self.config = config
        self._importance = {plain_name(name): item for name, item in (importance or {}).items()}
        self._ready_identity = None if ready is None else _file_identity(Path(ready))
        self._ready = {} if self._ready_identity is None else _load(*self._ready_identity)
        self._settings = factorizer_config(config)
        self._scope = Scope()
        self._heads: frozenset[str] = frozenset()

    def for_model(self, model: nn.Module) -> Self:
        """Read the names in all options as those of layers of ``model``, whatever is wrapped around it; return itself.

        Raises:
            OptionError: a name or pattern matches no layer of the model.
        """
        options: dict[str, Collection[str]] = {
            "importance": list(self._importance),
            "allocation": [name for names in self._mid_features or () for name in names.split(_AND)],
            "skip": [pattern for pattern in self.config.skip if pattern not in USUAL_PATTERNS],
            "overrides": list(self.config.overrides),
        }
        around = layer_names(model)
        self._scope = scope_of(options, around, exact=("importance", "allocation"))
        known = [self._scope.name(name) for name in around]
        for option, names in options.items():
            check_names(option, filter(self._scope.has, names), known, type(model).__name__)
        self._heads = frozenset(map(self._option_name, heads(model)))
        return self

    def _option_name(self, layer: str) -> str:
        return self._scope.name(plain_name(layer))

    def override_for(self, layer: str) -> float | None:
        """Return the bits per weight that an override, or the option of heads, gives to a layer, or None."""
        name = self._option_name(layer)
        if self._is_head(name) and not isinstance(self.config.head, str):
            return self.config.head
        return self.config.override_for(name)

    def _is_head(self, name: str) -> bool:
        return name in self._heads or any(fnmatchcase(name, pattern) for pattern in HEADS)

    def _bits_for(self, name: str) -> float:
        if self._is_head(name) and not isinstance(self.config.head, str):
            return self.config.head
        return self.config.bits_for(name)

    def group(self, name: str, weight: Tensor) -> Hashable | None:
        """Return None if a layer stays dense; layers with equal keys and one input may be factored as one.

        Args:
            name: of the layer.
            weight: [N, K]; only its shape, dtype and device count.
        """
        key = self._option_name(name)
        if key in self._ready:
            return ("ready", id(self._ready[key].signs_in))
        if self.why_dense(name, weight) is not None:
            return None
        in_features, bits = weight.shape[1], self._bits_for(key)
        if not self.config.merge_shared_inputs:
            return ("alone", key)
        return ("made", in_features, bits, weight.dtype, weight.device)

    def why_dense(self, name: str, weight: Tensor) -> str | None:
        """Return why a layer stays dense, or None if it is factored."""
        name = self._option_name(name)
        if name in self._ready:
            return None
        if self.config.skips(name):
            return "skipped by name"
        if self._is_head(name) and isinstance(self.config.head, str):
            return "the model's head"
        if not weight.is_floating_point():
            return f"of dtype {str(weight.dtype).removeprefix('torch.')}"
        out_features, in_features = weight.shape
        bits = self._bits_for(name)
        if mid_features_for(bits, in_features, out_features) < MIN_MID_FEATURES:
            return f"too small to gain at {bits:g} bits per weight"
        # Last: inspection asks for the reasons of a run on a model without data.
        return "on the meta device" if weight.device.type == "meta" else None

    @property
    def ready_names(self) -> list[str]:
        """Names of the layers whose factors were made before."""
        return list(self._ready)

    def is_ready(self, names: Sequence[str]) -> bool:
        """Return whether the factors of these layers were made before, from weights nobody here has seen."""
        return any(name in self._ready for name in names)

    def identity(self, names: Sequence[str]) -> str:
        """Return a hash of all that decides on the factors of these layers, except their weights."""
        source = self._ready_identity if self.is_ready(names) else (self._bits_for(names[0]), self._settings)
        digest = hashlib.sha256(repr((names, source)).encode())
        for name in names:
            digest.update(importance_hash(self._importance.get(name)))
        return digest.hexdigest()

    def make(self, stacks: Sequence[tuple[Sequence[str], Sequence[Tensor]]]) -> list[DoubleBinaryFactors]:
        """Return the factors of every stack of layers, on the device of its weights.

        Args:
            stacks: names of layers and their dense weights [N_i, K].

        Raises:
            WeightError: a weight cannot be factored.
            ConversionError: ready factors do not fit a weight.
        """
        jobs = [None if self.is_ready(names) else self.job(names, weights) for names, weights in stacks]
        store = CachedStore(FactorCache(self.config.cache_dir), self._settings)
        run_jobs([job for job in jobs if job], self._settings, store, self.config.progress)
        return [
            self._ready_factors(*stack) if job is None else store.get(job)
            for stack, job in zip(stacks, jobs, strict=True)
        ]

    def job(self, names: Sequence[str], weights: Sequence[Tensor]) -> FactorJob:
        """Return the job of factoring these layers as one weight.

        Raises:
            ConversionError: an allocation was given that knows nothing of them.
        """
        rows = [weight.shape[0] for weight in weights]
        keys = [self._option_name(name) for name in names]
        measured = [self._importance.get(key) for key in keys]
        if all(item is None for item in measured):
            stacked = None
        else:
            stacked = Importance.stack([item or Importance() for item in measured], rows)
        if self._mid_features is None or self.override_for(names[0]) is not None:
            mid_features = mid_features_for(self._bits_for(keys[0]), weights[0].shape[1], sum(rows))
        elif joined(keys) in self._mid_features:
            mid_features = self._mid_features[joined(keys)]
        else:
            raise ConversionError(
                f"an allocation without {joined(keys)!r}",
                f"one that has {', '.join(self._mid_features)}",
                "allocate for this model with the same skip, overrides and merge_shared_inputs",
            )
        return FactorJob(tuple(names), tuple(weights), stacked, mid_features)

    def jobs(self, model: nn.Module) -> list[FactorJob]:
        """Return the jobs of all layers of a model that are factored.

        Raises:
            OptionError: a name in the options matches no layer.
            ConversionError: there are none.
        """
        return [self.job(names, weights) for names, weights in stacks_of(model, self.for_model(model))]

    def _ready_factors(self, names: Sequence[str], weights: Sequence[Tensor]) -> DoubleBinaryFactors:
        for name, weight in zip(names, weights, strict=True):
            ready = self._ready[name]
            if (ready.out_features, ready.in_features) != tuple(weight.shape):
                raise ConversionError(
                    f"factors of shape {(ready.out_features, ready.in_features)} for {name!r}",
                    f"{tuple(weight.shape)}, the shape of its weight",
                    "check that the checkpoint belongs to this model",
                )
        return DoubleBinaryFactors.stack([self._ready[name] for name in names]).to(weights[0].device)


def _plain(names: str) -> str:
    """Return joined names of layers without the wrappers around them."""
    return joined([plain_name(name) for name in names.split(_AND)])


def factorizer_config(config: CompressionConfig) -> FactorizerConfig:
    """Return the settings of the factorizer: the iterations given, or else those of the preset."""
    iterations = PRESETS[config.preset] if config.iterations is None else config.iterations
    return FactorizerConfig(iterations=iterations, seed=config.seed)


def nothing_to_factor(
    model: nn.Module, dense: Mapping[str, str], config: CompressionConfig
) -> ConversionError:
    """Return the error for a model none of whose layers is factored; ``dense`` says of each why."""
    return ConversionError(
        f"{type(model).__name__} without a linear layer to factor" + (f": {listed(dense)}" if dense else ""),
        "nn.Linear or Conv1D layers that are called, are no more than their weights, and are not too small",
        f"check skip={list(config.skip)} and bits_per_weight={config.bits_per_weight}",
    )


def _file_identity(path: Path) -> tuple[Path, int, int]:
    """Return what tells one content of a file from another without reading it."""
    try:
        status = path.stat()
    except OSError:
        return (path, 0, 0)  # let the checkpoint's loader say what is wrong
    return (path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # a model is compiled several times: prefill, decode, new shapes
def _load(path: Path, mtime_ns: int, size: int) -> dict[str, DoubleBinaryFactors]:
    return checkpoint.load(path)


def factorize_model(
    model: nn.Module,
    config: CompressionConfig | None = None,
    importance: Mapping[str, Importance] | None = None,
    allocation: Allocation | Mapping[str, int] | None = None,
    **options: Unpack[CompressionKeywords],
) -> dict[str, DoubleBinaryFactors]:
    """Factor the dense linear layers of a model: ``weight [N, K] ≈ factors.dense()`` for each.

    Args:
        model: any module; its weights are read, not changed.
        config: bits, overrides, skips and settings of the factorizer.
        importance: layer name to second moments, as made by ``calibrate``.
        allocation: what ``allocate`` returned for this model, or R by name, for layers that no override names.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        Layer name to factors; layers factored together share the tensors of their first stage.

    Raises:
        OptionError: an unknown or ill-typed option, or a name that matches no layer.
        ConversionError: there is no layer to factor; the message says of each why.
        WeightError: a weight cannot be factored; the message names its layer.
    """
    factorizer = LayerFactorizer(resolve(CompressionConfig, config, options), importance, None, allocation)
    stacks = stacks_of(model, factorizer.for_model(model))
    factors: dict[str, DoubleBinaryFactors] = {}
    for (names, weights), stacked in zip(stacks, factorizer.make(stacks), strict=True):
        factors.update(zip(names, stacked.split([weight.shape[0] for weight in weights]), strict=True))
    return {name: factors[name] for name in dense_linears(model) if name in factors}


def stacks_of(model: nn.Module, factorizer: LayerFactorizer) -> list[tuple[list[str], list[Tensor]]]:
    """Return the layers of a model that are factored, those together that share their first stage; log what stays dense.

    Returns:
        Names of layers and their dense weights [N_i, K], for every stack.

    Raises:
        ConversionError: there are none.
    """
    layers: dict[str, Tensor] = {}
    groups: dict[Hashable, list[str]] = {}
    dense = why_dense(model, factorizer)
    for name, module in dense_linears(model).items():
        if name in dense:
            continue
        layers[name] = dense_weight(module).detach()
        key = factorizer.group(name, layers[name])
        parent, _, child = plain_name(name).rpartition(".")
        family = next((family for family in SIBLINGS if child in family), None)
        groups.setdefault((parent, family, key) if family else name, []).append(name)
    if not layers:
        raise nothing_to_factor(model, dense, factorizer.config)
    tell_left_dense(model, len(layers), dense)
    return [(names, [layers[name] for name in names]) for names in groups.values()]


def why_dense(model: nn.Module, factorizer: LayerFactorizer) -> dict[str, str]:
    """Return, for each linear layer of a model that stays dense, the reason: that of the options, or one of its own."""
    is_factored = not isinstance(factorizer.config.head, str)
    own = reasons_to_stay_dense(model, heads(model) if is_factored else ())
    reasons = {
        name: factorizer.why_dense(name, dense_weight(module)) or own.get(name)
        for name, module in dense_linears(model).items()
    }
    others = other_matrices(model)
    return {name: reason for name, reason in (own | others | reasons).items() if reason is not None}


def convert_(
    model: nn.Module,
    factors: Mapping[str, DoubleBinaryFactors] | None = None,
    *,
    config: CompressionConfig | None = None,
    importance: Mapping[str, Importance] | None = None,
    allocation: Allocation | Mapping[str, int] | None = None,
    **options: Unpack[CompressionKeywords],
) -> nn.Module:
    """Replace the dense linear layers of a model by ``DoubleBinaryLinear``, in place.

    Args:
        model: any module with ``nn.Linear`` or GPT-2's Conv1D layers.
        factors: ready factors by layer name; None to make them now. Of the options ``skip``, ``head`` and ``embedding`` alone
            then count, where they are passed as keywords.
        config: bits, overrides, skips and settings of the factorizer.
        importance: layer name to second moments, as made by ``calibrate``.
        allocation: what ``allocate`` returned for this model, or R by name, for layers that no override names.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        ``model``; where ``model`` itself is a linear layer, the layer that takes its place.

    Raises:
        OptionError: an unknown or ill-typed option.
        ConversionError: factors that do not fit the model, or nothing to convert.
    """
    settings = resolve(CompressionConfig, config, options)
    if not isinstance(model, nn.Module):
        raise ConversionError(
            f"a model of type {type(model).__name__}",
            "a torch.nn.Module",
            "pass the module that has the layers",
        )
    tables: Mapping[str, QuantizedRows] = {}
    if factors is None:
        factors = factorize_model(model, settings, importance, allocation)
        tables = make_tables(model, settings)
    elif not factors:
        raise nothing_to_factor(model, {}, settings)
    else:
        factors = _in_model(factors, model)
        if "skip" in options:
            patterns = [pattern for pattern in settings.skip if pattern not in USUAL_PATTERNS]
            check_names("skip", patterns, layer_names(model), type(model).__name__)
            factors = {name: layer for name, layer in factors.items() if not settings.skips(plain_name(name))}
        if {"head", "embedding"} & options.keys():
            tables = make_tables(model, settings)
    return swap_tables_(swap_(model, factors), tables)


def _in_model(factors: Mapping[str, DoubleBinaryFactors], model: nn.Module) -> dict[str, DoubleBinaryFactors]:
    """Return factors by the names that their layers have in the model, which may be wrapped since they were made."""
    layers = dense_linears(model)
    if not factors.keys() - layers.keys():
        return dict(factors)
    scope = scope_of({"factors": factors}, [plain_name(name) for name in layers])
    names = {scope.name(plain_name(name)): name for name in layers}
    return {names.get(key, key): layer for key, layer in factors.items() if scope.has(key)}
