"""What the names in a compressed folder mean in a model of another class than the one that was compressed.

A folder opens without its head, with another head, or as a part of a larger model. transformers renames tensors on the way,
adds and removes base prefixes, and reports what it does not need. A factored layer goes where its tensors go.

Used are functions of transformers that are the same in 5.16 to 5.23, as its loader calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from dbf_compile.errors import CheckpointError
from dbf_compile.integrations.experts import WEIGHTS, Experts, is_fused
from dbf_compile.linear import dense_linears, dense_weight

_TENSOR = ".scale_out"  # of the tensors of a factored layer the one that has a number for each row
_WEIGHT = ".down_proj"  # of fused experts


def layers_in(
    model: Any, layers: Mapping[str, Mapping[str, Any]], files: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the table of those factored layers that a model has, under the names that they have in it.

    A layer that the folder has in another size, such as a head for another number of labels, is left to transformers.

    Args:
        model: dense, of transformers, on the meta device; its experts linearized as those of the folder.
        layers: the table of the folder.
        files: weight files of the folder; none where the tensors come from elsewhere.

    Raises:
        CheckpointError: a name is no layer of the model that was compressed.
    """
    dense, stored_rows = dense_linears(model), stored_rows_of(files, _TENSOR)
    rename = in_model(model, (name + _TENSOR for name in dense))
    targets: dict[str, str] = {}
    for name in layers:
        target = rename(name + _TENSOR).removesuffix(_TENSOR)
        if target in dense:
            rows = dense_weight(dense[target]).shape[0]
            if stored_rows.get(name, rows) == rows:
                targets[name] = target
        elif name not in stored_rows and _was_compressed(model):
            raise CheckpointError(
                f"factors for {name!r}, which is no linear layer of {type(model).__name__}",
                ", ".join(dense) or "none: the model has no linear layer",
                "load with the class of the model that was compressed",
            )
    return {
        target: {**layers[name], "shares_first_stage_with": targets.get(_owner(layers[name]))}
        for name, target in targets.items()
    }


def experts_in(model: Any, names: Collection[str]) -> set[str]:
    """Return the names that fused experts of a folder have in a model."""
    rename = in_model(model, (name + _WEIGHT for name, module in model.named_modules() if is_fused(module)))
    return {rename(name + _WEIGHT).removesuffix(_WEIGHT) for name in names}


def in_model(model: Any, further: Iterable[str] = ()) -> Callable[[str], str]:
    """Return what gives the name of a tensor in a model for its name in a file, as the loader of transformers does it.

    Args:
        model: of transformers.
        further: names of tensors that it will have, besides those that it has.
    """
    renamings, converters = _kinds(get_model_conversion_mapping(model))
    names = dict.fromkeys([*model.state_dict(), *further], True)

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        if renamed not in names and name in names:
            renamed, _ = rename_source_key(name, [], [], model.base_model_prefix, names)
        return str(renamed)

    return rename


def in_files(model: Any) -> Callable[[str], str]:
    """Return what gives the name of a tensor of a model in files, as ``save_pretrained`` does it.

    A tensor that transformers would not only rename keeps its name: its loader takes it under that, too.
    """
    renamings, converters = _kinds([one.reverse_transform() for one in conversions_of_saving(model)[::-1]])

    def rename(name: str) -> str:
        renamed, converter = rename_source_key(name, renamings, converters, reverse=True)
        return name if converter is not None else str(renamed)

    return rename


def table_in_files(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a table of factored layers under the names that they have in files."""
    rename = in_files(model)
    names = {name: rename(name + _TENSOR).removesuffix(_TENSOR) for name in layers}
    return {
        names[name]: {**entry, "shares_first_stage_with": names.get(_owner(entry))}
        for name, entry in layers.items()
    }


def conversions_of_saving(model: Any) -> list[Any]:
    """Return how ``save_pretrained`` converts the weights of a model, but for those that fuse linearized experts."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as transformers itself does for models that were not loaded
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [one for one in conversions if not isinstance(one, PrefixChange)]
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    weights = [f"{name}.{weight}.0.weight" for name in experts for weight in WEIGHTS]
    return [
        one
        for one in conversions
        if not isinstance(one, WeightConverter)
        or all(one.reverse_transform().rename_source_key(weight)[1] is None for weight in weights)
    ]


def _owner(entry: Mapping[str, Any]) -> str:
    return entry["shares_first_stage_with"] or ""


def _was_compressed(model: nn.Module) -> bool:
    """Return whether the folder was written from the class of ``model``."""
    architectures = getattr(model.config, "architectures", None) or ()
    return any(kind.__name__ in architectures for kind in type(model).__mro__)


def _kinds(transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    return renamings, [one for one in transforms if isinstance(one, WeightConverter)]


def stored_rows_of(files: Sequence[str], ending: str) -> dict[str, int]:
    """Return the first size of every tensor with an ending of its name in weight files, by its name there without it."""
    rows = {}
    for path in files:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dictionary
                    if key.endswith(ending):
                        rows[key.removesuffix(ending)] = (*file.get_slice(key).get_shape(), 1)[0]
    return rows
