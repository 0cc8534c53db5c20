"""Hugging Face: what a compressed folder holds, and the quantizer that loads it.

    config.json               "quantization_config": {"quant_method": "dbf", "dbf_format_version": 2,
                              "layers": {name: {"mid_features": R, "shares_first_stage_with": name or null}}}
    model*.safetensors        "<layer>.<tensor>" for the five tensors of a factored layer as it holds them, signs
                              interleaved (a shared first stage is stored once, as tied weights are), everything
                              else under its name in the dense model
    dbf_report.json           where it came from, and what every layer lost
    *_dbf.py                  for ``trust_remote_code=True``: they import dbf_compile, which registers the quantizer

A factored layer also stores an empty tensor "<layer>.weight". Where this package is not imported, transformers knows
no "dbf", says so in a warning, and would go on with random weights: at the shape of that tensor it stops instead.

``import dbf_compile`` registers the quantizer. Only the part of its interface is used that is the same in
transformers 5.16 to 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dbf_compile.errors import CheckpointError, ConversionError, FactorsError
from dbf_compile.factors import (
    FIRST_STAGE,
    TENSOR_NAMES,
    DoubleBinaryFactors,
    factor_dtypes,
    factor_shapes,
)
from dbf_compile.integrations.experts import linearize_experts_
from dbf_compile.linear import (
    WEIGHT_PLACEHOLDER,
    DoubleBinaryLinear,
    dense_linears,
    dense_weight,
    replace_everywhere,
)

METHOD, VERSION = "dbf", 2
_DAMAGED = "the folder is damaged: compress the model again"

Layers = Mapping[str, Mapping[str, Any]]


class DBFConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    Args:
        layers: name of each factored layer to its ``mid_features``, and the layer whose first stage it shares.
        dbf_format_version: version of the layout of the folder.
        bits_per_weight: stored bits per weight of the factored layers, for the record.
    """

    def __init__(
        self,
        layers: Layers | None = None,
        dbf_format_version: int = VERSION,
        bits_per_weight: float | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.dbf_format_version = dbf_format_version
        self.bits_per_weight = bits_per_weight
        self.layers = {} if layers is None else layers
        self.post_init()

    def post_init(self) -> None:
        """Check all fields; they come from a file.

        Raises:
            CheckpointError: a newer version, or a table of layers that no compression wrote.
        """
        if self.dbf_format_version != VERSION:
            raise CheckpointError(
                f"dbf_format_version={self.dbf_format_version!r}",
                f"dbf_format_version={VERSION}",
                "update dbf_compile",
            )
        if not isinstance(self.layers, Mapping):
            raise CheckpointError(f"layers of type {type(self.layers).__name__}", "a dictionary", _DAMAGED)
        for name, entry in self.layers.items():
            size = entry.get("mid_features") if isinstance(entry, Mapping) else None
            if type(size) is not int or size < 1:
                raise CheckpointError(f"layer {name!r}: {entry!r}", "mid_features of 1 or more", _DAMAGED)
            owner = self.layers.get(entry.get("shares_first_stage_with") or name, {})
            if (
                not isinstance(owner, Mapping)
                or owner.get("shares_first_stage_with") is not None
                or owner.get("mid_features") != size
            ):
                raise CheckpointError(
                    f"layer {name!r}: {entry!r}",
                    "a first stage of its own, or that of a layer of equal mid_features that has one",
                    _DAMAGED,
                )


class DBFQuantizer(HfQuantizer):
    """Replaces dense layers by factored ones before ``from_pretrained`` reads their tensors."""

    requires_calibration = True
    quantization_config: DBFConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to factor while loading.

        Raises:
            ConversionError: the folder holds a dense model.
        """
        if not self.pre_quantized:
            raise ConversionError(
                "a dense model to be factored by from_pretrained",
                "a folder written by dbf_compile.compress",
                "call dbf_compile.compress(path, output, bits=2.0) first",
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        linearize_experts_(model)
        insert_layers_(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        finish_layers_(model, self.quantization_config.layers)
        if type(model).__module__.startswith("transformers."):
            # Saved again, its folder will be without the code that this names; remote code is saved with its model.
            vars(model.config).pop("auto_map", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that ``save_pretrained`` works: tensors are stored under the names they have in the model."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what ``save_pretrained`` writes: the state, and an empty weight for each factored layer."""
        state = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, DoubleBinaryLinear):
                empty = torch.empty(layer.out_features, 0, dtype=layer.weight_dtype)
                state[f"{name}.{WEIGHT_PLACEHOLDER}"] = empty
        return state, {}

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top; the factors themselves are constants."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True


def layer_table(factors: Mapping[str, DoubleBinaryFactors]) -> dict[str, dict[str, Any]]:
    """Return ``layers`` of :class:`DBFConfig` for factors, those of one ``split`` sharing their first stage."""
    owners: dict[int, str] = {}
    table = {}
    for name, layer in factors.items():
        owner = owners.setdefault(id(layer.signs_in), name)
        table[name] = {
            "mid_features": layer.mid_features,
            "shares_first_stage_with": None if owner == name else owner,
        }
    return table


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
        layer = DoubleBinaryLinear(_empty(columns, entry["mid_features"], rows), _parameter(old.bias))
        owner = entry["shares_first_stage_with"]
        if owner is not None:
            if inserted[owner].in_features != columns:
                raise CheckpointError(
                    f"layer {name!r} of {columns} in_features shares its first stage with {owner!r}",
                    f"{inserted[owner].in_features} in_features",
                    _DAMAGED,
                )
            layer.share_first_stage_(inserted[owner])
            for tensor in FIRST_STAGE:
                shared[f"{name}.{tensor}"] = f"{owner}.{tensor}"
        inserted[name] = layer
        replace_everywhere(model, old, layer)
        # What the file has in place of the dense weight; loaded for its dtype, which is float32 where others are not.
        layer._buffers[WEIGHT_PLACEHOLDER] = torch.empty(rows, 0, dtype=layer.weight_dtype, device="meta")
    ties: Any = model
    ties.all_tied_weights_keys = {**(getattr(model, "all_tied_weights_keys", None) or {}), **shared}


def finish_layers_(model: nn.Module, layers: Layers) -> None:
    """Finish layers whose tensors have been loaded, in place: share first stages, check all tensors.

    Raises:
        CheckpointError: tensors are missing, or are no factors.
    """
    for name, entry in layers.items():
        layer: Any = model.get_submodule(name)
        layer.weight_dtype = layer._buffers.pop(WEIGHT_PLACEHOLDER).dtype
        owner = entry["shares_first_stage_with"]
        if owner is not None:
            layer.share_first_stage_(model.get_submodule(owner))
        elif layer.signs_in.device.type == "meta":
            continue  # offloaded to disk: its tensors are not here yet
        absent = [
            tensor
            for tensor in TENSOR_NAMES
            if not (owner and tensor in FIRST_STAGE) and not _was_loaded(getattr(layer, tensor))
        ]
        if absent:
            raise CheckpointError(f"layer {name!r} without {', '.join(absent)}", "all five tensors", _DAMAGED)
        for tensor in TENSOR_NAMES:
            getattr(layer, tensor).requires_grad_(False)
        try:
            _ = layer.factors
        except FactorsError as error:
            raise CheckpointError(f"layer {name!r}: {error.got}", error.allowed, _DAMAGED) from error


def _was_loaded(tensor: Tensor) -> bool:
    # transformers sets this attribute on every tensor that it loads.
    return bool(getattr(tensor, "_is_hf_initialized", False))


def _parameter(bias: object) -> nn.Parameter | None:
    return bias if isinstance(bias, nn.Parameter) else None


def _empty(in_features: int, mid_features: int, out_features: int) -> DoubleBinaryFactors:
    shapes, dtypes = factor_shapes(in_features, mid_features, out_features), factor_dtypes()
    return DoubleBinaryFactors(
        **{name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    )


# Importing this file is what registers; it happens once.
register_quantization_config(METHOD)(DBFConfig)
register_quantizer(METHOD)(DBFQuantizer)
