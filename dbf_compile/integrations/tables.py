"""Tables of quantized rows in models of transformers: their entries in config.json, loading, saving.

    "tables": {name of layer: {"kind": "int8", "shares_rows_with": name of another layer, or null}}

A table is stored once, as "<layer>.rows"; layers that read that of another one are tied to it, as dense weights are. Beside it
lies an empty "<layer>.weight", for the same reason as beside factors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.candidates.dense import linears
from dbf_compile.candidates.tables import embeddings
from dbf_compile.errors import CheckpointError
from dbf_compile.integrations.loading import DAMAGED, is_here, was_loaded
from dbf_compile.linear import WEIGHT_PLACEHOLDER, dense_weight, replace_everywhere
from dbf_compile.rows import ROW_FORMATS, scales_of
from dbf_compile.tables import ROWS, QuantizedRows, table_layer, table_layers

Tables = Mapping[str, Mapping[str, Any]]
TENSOR = f".{ROWS}"
_OWNER = "shares_rows_with"


def check_entries(tables: object) -> None:
    """Check the entries of config.json.

    Raises:
        CheckpointError: they are not such as a compression wrote.
    """
    if not isinstance(tables, Mapping):
        raise CheckpointError(f"config.json: tables of type {type(tables).__name__}", "a dictionary", DAMAGED)
    for name, entry in tables.items():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        if not isinstance(kind, str) or kind not in ROW_FORMATS:
            raise CheckpointError(
                f"config.json: table {name!r}: {entry!r}", f"kind of {', '.join(ROW_FORMATS)}", DAMAGED
            )
        shared = entry.get(_OWNER)
        owner = tables.get(name if shared is None else str(shared))
        if not isinstance(owner, Mapping) or owner.get(_OWNER) is not None or owner.get("kind") != kind:
            raise CheckpointError(
                f"config.json: table {name!r}: {entry!r}",
                "rows of its own, or those of a layer of the same kind that has its own",
                DAMAGED,
            )


def entries(kinds: Mapping[str, str], owner_of: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Return the entries of layers.

    Args:
        kinds: names of layers to formats.
        owner_of: returns something that is equal for layers of one table.
    """
    owners: dict[object, str] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        owner = owners.setdefault(owner_of(name), name)
        table[name] = {"kind": kind, _OWNER: None if owner == name else owner}
    return table


def entries_of(model: Any) -> dict[str, dict[str, Any]]:
    """Return the entries of the tables that a model has; who offloads tensors breaks up what was shared."""
    layers = table_layers(model)
    ties = getattr(model, "all_tied_weights_keys", None) or {}

    def owner_of(name: str) -> object:
        tied = ties.get(name + TENSOR, "").removesuffix(TENSOR)
        return id(layers[tied if tied in layers else name].rows)

    return entries({name: layer.kind for name, layer in layers.items()}, owner_of)


def ties_of(tables: Tables) -> dict[str, str]:
    """Return which parameters are tied to which."""
    return {
        f"{name}.{tensor}": f"{entry[_OWNER]}.{tensor}"
        for name, entry in tables.items()
        for tensor in (WEIGHT_PLACEHOLDER, ROWS)
        if entry[_OWNER] is not None
    }


def without_ties(known: Mapping[str, str], tables: Tables) -> dict[str, str]:
    """Return ties of a model but for those of the dense weights that tables replace."""
    replaced = {f"{name}.{WEIGHT_PLACEHOLDER}" for name in tables}
    return {key: owner for key, owner in known.items() if key not in replaced}


def renamed(tables: Tables, rename: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """Return entries under other names of their tensors."""
    names = {name: rename(name + TENSOR).removesuffix(TENSOR) for name in tables}
    return {names[name]: {**entry, _OWNER: names.get(entry[_OWNER])} for name, entry in tables.items()}


def tables_in(
    model: Any,
    tables: Tables,
    stored_rows: Mapping[str, int],
    rename: Callable[[str], str],
    others: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return the entries of those tables that a model has, under the names that they have in it.

    A layer that the class of the model ties to one with a table reads that table, too.

    Args:
        model: dense, of transformers, on the meta device.
        tables: entries of the folder.
        stored_rows: number of rows of each table in the files.
        rename: gives the name of a tensor in the model for that in a file.
        others: names of layers that are factored.
    """
    dense = {**embeddings(model), **linears(model)}
    targets: dict[str, str] = {}
    for name in tables:
        target = rename(name + TENSOR).removesuffix(TENSOR)
        owner = tables[name][_OWNER] or name
        if target in dense and stored_rows.get(owner, _rows(dense[target])) == _rows(dense[target]):
            targets[name] = target
    inside = {
        target: {"kind": tables[name]["kind"], _OWNER: targets.get(tables[name][_OWNER])}
        for name, target in targets.items()
        if (tables[name][_OWNER] or name) in targets
    }
    suffix = f".{WEIGHT_PLACEHOLDER}"
    for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        name, other = key.removesuffix(suffix), source.removesuffix(suffix)
        if other in inside and name in dense and name not in inside and name not in others:
            inside[name] = {"kind": inside[other]["kind"], _OWNER: inside[other][_OWNER] or other}
    return inside


def insert_tables_(model: nn.Module, tables: Tables) -> None:
    """Replace dense layers by such as read tables, without content, on the meta device, in place."""
    dense = {**embeddings(model), **linears(model)}
    for name, entry in sorted(tables.items(), key=lambda item: item[1][_OWNER] is not None):
        old: Any = dense[name]
        count, columns = (old.weight if isinstance(old, nn.Embedding) else dense_weight(old)).shape
        owner: Any = None if entry[_OWNER] is None else model.get_submodule(entry[_OWNER])
        table = QuantizedRows.empty(count, columns, entry["kind"]) if owner is None else owner.table
        if (len(table.rows), table.columns) != (count, columns):
            raise CheckpointError(
                f"layer {name!r} of shape {(count, columns)} reads the table of {entry[_OWNER]!r}",
                f"shape {(len(table.rows), table.columns)}",
                DAMAGED,
            )
        layer: Any = table_layer(old, table, None if owner is None else owner.weight)
        layer._is_hf_initialized = (
            True  # else transformers fills the weight of every nn.Embedding with random numbers
        )
        replace_everywhere(model, old, layer)
    ties: Any = model
    shared = ties_of(tables)
    ties.all_tied_weights_keys = {
        **without_ties(getattr(model, "all_tied_weights_keys", None) or {}, tables),
        **shared,
    }
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ties._keys_to_ignore_on_load_missing = {*ignored, *(f"^{re.escape(name)}$" for name in shared)}


def finish_tables_(model: nn.Module, tables: Tables) -> None:
    """Finish layers whose tables have been loaded, in place: share them, check them.

    Raises:
        CheckpointError: a table is missing, or has a scale that is not finite.
    """
    for name, entry in sorted(tables.items(), key=lambda item: item[1][_OWNER] is not None):
        layer: Any = model.get_submodule(name)
        owner: Any = None if entry[_OWNER] is None else model.get_submodule(entry[_OWNER])
        if owner is not None:
            layer.set_rows_(owner._parameters[WEIGHT_PLACEHOLDER], owner.table)
        for tensor in (WEIGHT_PLACEHOLDER, ROWS):
            layer._parameters[tensor].requires_grad_(False)
        if owner is not None or not is_here(layer.rows):
            continue
        if not was_loaded(layer.rows):
            raise CheckpointError(f"layer {name!r} without {ROWS}", "its table", DAMAGED)
        table = layer.table
        if not bool(torch.isfinite(scales_of(table.rows, table.columns, ROW_FORMATS[table.kind])).all()):
            raise CheckpointError(
                f"layer {name!r}: {ROWS} with NaN or infinite scales", "finite scales", DAMAGED
            )


def save_tables_(state: dict[str, Tensor], tables: Tables) -> None:
    """Make a state dictionary one of files, in place: every table once."""
    for name, entry in tables.items():
        if entry[_OWNER] is not None:
            for tensor in (WEIGHT_PLACEHOLDER, ROWS):
                state.pop(f"{name}.{tensor}", None)


def table_pieces(
    name: str, table: QuantizedRows, entry: Mapping[str, Any], dtype: torch.dtype
) -> list[tuple[str, int, Callable[[], Tensor]]]:
    """Return what a file holds for a layer that reads a table: name, bytes and tensor of each part."""
    if entry[_OWNER] is not None:
        return []
    empty = torch.empty(len(table.rows), 0, dtype=dtype)
    return [
        (f"{name}.{WEIGHT_PLACEHOLDER}", 0, lambda: empty),
        (name + TENSOR, 4 * table.rows.numel(), lambda: table.rows.detach().to("cpu", copy=True)),
    ]


def _rows(layer: nn.Module) -> int:
    return len(layer.weight if isinstance(layer, nn.Embedding) else dense_weight(layer))
