"""Which embeddings and heads of a model become tables of quantized rows, by the options; and why others do not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from dbf_compile.candidates import tables as candidates
from dbf_compile.names import layer_names, plain_name, scope_of
from dbf_compile.options import USUAL_PATTERNS, CompressionConfig
from dbf_compile.tables import QuantizedRows, quantize_tables

DENSE = "dense"


class TablePlan(NamedTuple):
    """What becomes of the embeddings and heads of a model.

    Args:
        kinds: names of those that become tables, to names of formats.
        reasons: names of those that stay dense, to the reason.
    """

    kinds: dict[str, str]
    reasons: dict[str, str]


def plan_tables(model: nn.Module, config: CompressionConfig) -> TablePlan:
    """Decide for every embedding and head of a model. Layers that share a weight share a table, if they are of one kind.

    A weight that one of its readers keeps dense is read by the embeddings among the others as it is: nothing would be gained.
    """
    heads, embeddings = candidates.heads(model), candidates.embeddings(model)
    against = candidates.reasons_against_tables(model)
    skips = _skips(model, config)
    kinds: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name in (*embeddings, *heads):
        option = config.head if name in heads else config.embedding
        if name == "" or not isinstance(option, str):
            continue  # the model itself; or it is factored, as other layers
        weight = model.get_submodule(name)._parameters["weight"] if name not in against else None
        if skips(name):
            reasons[name] = "skipped by name"
        elif weight is None:
            reasons[name] = against[name]
        elif option == DENSE:
            reasons[name] = "the model's head" if name in heads else "an embedding"
        elif weight.numel() < candidates.MIN_WEIGHTS:
            reasons[name] = "too small to gain"
        else:
            kinds[name] = option
    return TablePlan(*_without_gain(model, kinds, reasons, [*embeddings, *heads]))


def make_tables(model: nn.Module, config: CompressionConfig) -> dict[str, QuantizedRows]:
    """Return the tables of a dense model that the options ask for, by layer; without those whose weight is not there."""
    kinds = plan_tables(model, config).kinds
    there = [name for name in kinds if not _is_meta(model.get_submodule(name))]
    return quantize_tables(model, {name: kinds[name] for name in there})


def _is_meta(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters(recurse=False))


def _skips(model: nn.Module, config: CompressionConfig) -> _Skips:
    patterns = [pattern for pattern in config.skip if pattern not in USUAL_PATTERNS]
    return _Skips(config, scope_of({"skip": patterns}, layer_names(model)))


class _Skips:
    """Tells which layers the options name in ``skip``, whatever is wrapped around the model."""

    def __init__(self, config: CompressionConfig, scope: object) -> None:
        self._config, self._scope = config, scope

    def __call__(self, name: str) -> bool:
        return self._config.skips(self._scope.name(plain_name(name)))  # type: ignore[attr-defined]


def _without_gain(
    model: nn.Module, kinds: dict[str, str], reasons: dict[str, str], names: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Leave embeddings dense whose weight has to be kept for another reader."""
    factored = [name for name in names if name and name not in kinds and name not in reasons]
    readers = candidates.readers_of(model, [*kinds, *factored])
    kept = {weight for weight, layers in readers.items() if not {*layers} <= {*kinds, *factored}}
    result: dict[str, str] = {}
    for name, kind in kinds.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding) and id(layer._parameters["weight"]) in kept:
            reasons[name] = "whose weight another layer keeps"
        else:
            result[name] = kind
    return result, reasons
