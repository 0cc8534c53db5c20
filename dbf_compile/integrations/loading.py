"""Factored layers in a model that transformers is loading: put in empty before, finished after.

Shared first stages are tied parameters: transformers is told in ``all_tied_weights_keys``, ties them, and offloads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.errors import CheckpointError, FactorsError
from dbf_compile.factors import (
    FIRST_STAGE,
    SCALE_DTYPES,
    TENSOR_NAMES,
    DoubleBinaryFactors,
    factor_dtypes,
    factor_shapes,
)
from dbf_compile.linear import (
    WEIGHT_PLACEHOLDER,
    DoubleBinaryLinear,
    dense_linears,
    dense_weight,
    replace_everywhere,
)

DAMAGED = "the folder is damaged: compress the model again"
SCALES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}

Layers = Mapping[str, Mapping[str, Any]]


def insert_layers_(model: nn.Module, layers: Layers) -> None:
    """Replace dense layers by factored ones without content, on the meta device, in place.

    Raises:
        CheckpointError: a name is no dense linear layer of the model.
    """
    dense = dense_linears(model)
    missing = [name for name in layers if name not in dense]
    if missing:
        raise CheckpointError(
            f"factors for {missing[0]!r}, which is no linear layer of {type(model).__name__}",
            ", ".join(dense) or "none: the model has no linear layer",
            "load with the class of the model that was compressed",
        )
    inserted: dict[str, DoubleBinaryLinear] = {}
    shared: dict[str, str] = {}
    for name, entry in sorted(
        layers.items(), key=lambda item: item[1]["shares_first_stage_with"] is not None
    ):
        old = dense[name]
        rows, columns = dense_weight(old).shape
        layer = DoubleBinaryLinear(_empty(columns, rows, entry), _parameter(old.bias))
        owner = entry["shares_first_stage_with"]
        if owner is not None:
            if inserted[owner].in_features != columns:
                raise CheckpointError(
                    f"layer {name!r} of {columns} in_features shares its first stage with {owner!r}",
                    f"{inserted[owner].in_features} in_features",
                    DAMAGED,
                )
            layer.share_first_stage_(inserted[owner])
            for tensor in FIRST_STAGE:
                shared[f"{name}.{tensor}"] = f"{owner}.{tensor}"
        inserted[name] = layer
        replace_everywhere(model, old, layer)
        # What the file has in place of the dense weight; loaded for its dtype, which is float32 where others are not.
        layer._buffers[WEIGHT_PLACEHOLDER] = torch.empty(rows, 0, dtype=layer.weight_dtype, device="meta")
    ties: Any = model
    replaced = {f"{name}.{WEIGHT_PLACEHOLDER}" for name in layers}
    known = getattr(model, "all_tied_weights_keys", None) or {}
    ties.all_tied_weights_keys = {key: tied for key, tied in known.items() if key not in replaced} | shared
    # Some classes, such as Wav2Vec2ForCTC, tie nothing: finish_layers_ does, and nothing is missing there either.
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ties._keys_to_ignore_on_load_missing = {*ignored, *(f"^{re.escape(name)}$" for name in shared)}


def finish_layers_(model: nn.Module, layers: Layers) -> None:
    """Finish layers whose tensors have been loaded, in place: share first stages, check all tensors.

    Raises:
        CheckpointError: tensors are missing, or are no factors.
    """
    for name, entry in layers.items():
        layer: Any = model.get_submodule(name)
        layer.weight_dtype = layer._buffers.pop(WEIGHT_PLACEHOLDER).dtype
        for hook in offload_hooks(layer):
            hook.original_devices.pop(WEIGHT_PLACEHOLDER, None)
        owner = entry["shares_first_stage_with"]
        if owner is not None:
            layer.share_first_stage_(model.get_submodule(owner))
        for tensor in TENSOR_NAMES:
            getattr(layer, tensor).requires_grad_(False)
        if not is_here(layer.signs_out):
            continue
        absent = [tensor for tensor in TENSOR_NAMES if not was_loaded(getattr(layer, tensor))]
        if absent:
            raise CheckpointError(f"layer {name!r} without {', '.join(absent)}", "all five tensors", DAMAGED)
        try:
            _ = layer.factors
        except FactorsError as error:
            raise CheckpointError(f"layer {name!r}: {error.got}", error.allowed, DAMAGED) from error
    for name, layer in dense_linears(model).items():
        if (
            dense_weight(layer).numel() == 0
        ):  # what stands for a factored weight; before 5.21 transformers takes any size
            raise CheckpointError(
                f"dense layer {name!r}, which the folder has factored and in another size",
                "layers of the sizes that were compressed",
                "load it with those, or with a newer transformers and ignore_mismatched_sizes=True",
            )


def keep_together_(
    device_map: dict[str, Any], layers: Layers, owner_key: str = "shares_first_stage_with"
) -> None:
    """Put layers that share their first stage, or their table, on one side of a map from the names of modules to devices, in place."""

    def place(name: str) -> Any:
        parents = [key for key in device_map if key == "" or f"{name}.".startswith(f"{key}.")]
        return device_map[max(parents, key=len)] if parents else "cpu"

    for name, entry in layers.items():
        owner = entry[owner_key]
        if owner is not None and place(name) != place(owner):
            device_map[name] = place(owner)


def offload_hooks(layer: Any) -> list[Any]:
    """Return the hooks of accelerate on a layer that bring its tensors back from where they are offloaded to."""
    hook = getattr(layer, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "original_devices")]


def is_here(tensor: Tensor) -> bool:
    """Return whether a parameter has its whole content: it is neither offloaded to disk nor sharded over processes."""
    return not tensor.is_meta and type(tensor) is nn.Parameter


def was_loaded(tensor: Tensor) -> bool:
    """Return whether a tensor came from a file."""
    # transformers sets this attribute on every tensor that it loads.
    return bool(getattr(tensor, "_is_hf_initialized", False))


def _parameter(bias: object) -> nn.Parameter | None:
    return bias if isinstance(bias, nn.Parameter) else None


def _empty(in_features: int, out_features: int, entry: Mapping[str, Any]) -> DoubleBinaryFactors:
    shapes = factor_shapes(in_features, entry["mid_features"], out_features)
    dtypes = factor_dtypes(SCALES[entry.get("scale_dtype", "float16")])
    try:
        return DoubleBinaryFactors(
            **{name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
        )
    except FactorsError as error:  # the model has a layer without inputs or outputs
        raise CheckpointError(f"config.json: {error.got}", error.allowed, DAMAGED) from error
