"""Hugging Face: what a compressed folder holds, and the quantizer that loads it.

    config.json               "quantization_config": {"quant_method": "dbf", "dbf_format_version": 2,
                              "layers": {name: {"mid_features": R, "shares_first_stage_with": name or null,
                              "scale_dtype": if it is not "float16"}}, "fused_experts": [name], "tables": see
                              :mod:`dbf_compile.integrations.tables`; with these version 3}, again in the
                              configuration of every part of the model
    model*.safetensors        "<layer>.<tensor>" for the five tensors of a factored layer as it holds them, signs
                              interleaved (a shared first stage is stored once, as tied weights are), everything
                              else under the name that ``save_pretrained`` gives it
    dbf_report.json           where it came from, and what every layer lost
    *_dbf.py                  for ``trust_remote_code=True``: they import dbf_compile, which registers the quantizer

A factored layer also stores an empty tensor "<layer>.weight". Where this package is not imported, transformers knows
no "dbf", says so in a warning, and would go on with random weights: at the shape of that tensor it stops instead.

``import dbf_compile`` registers the quantizer. Only the part of its interface is used that is the same in
transformers 5.16 to 5.23. ``save_pretrained`` of a model writes the same folder but for report and code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dbf_compile.candidates.dense import linears
from dbf_compile.candidates.tables import embeddings
from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.factors import FIRST_STAGE, TENSOR_NAMES, DoubleBinaryFactors
from dbf_compile.integrations.content import METHOD as METHOD
from dbf_compile.integrations.content import check_content, check_index
from dbf_compile.integrations.experts import Experts, is_fused, linearize_experts_
from dbf_compile.integrations.loading import (
    DAMAGED,
    SCALES,
    Layers,
    finish_layers_,
    insert_layers_,
    keep_together_,
)
from dbf_compile.integrations.renaming import experts_in, in_model, layers_in, stored_rows_of
from dbf_compile.integrations.tables import (
    TENSOR,
    Tables,
    check_entries,
    entries_of,
    finish_tables_,
    insert_tables_,
    save_tables_,
    tables_in,
    ties_of,
    without_ties,
)
from dbf_compile.linear import WEIGHT_PLACEHOLDER, DoubleBinaryLinear
from dbf_compile.tables import table_layers

VERSIONS = (2, 3)
_PLANS = "_resolve_parallel_plans"  # asked from 5.20 on before anything is split; earlier, the loaded model is looked at


class DBFConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    Args:
        layers: name of each factored layer to its ``mid_features``, and the layer whose first stage it shares.
        dbf_format_version: version of the layout of the folder.
        bits_per_weight: stored bits per weight of the factored layers, for the record.
        fused_experts: names of modules whose experts have no linear layers of their own.
        tables: entries of the layers that read tables of quantized rows.
    """

    tables: Tables = {}  # noqa: RUF012, none in folders of version 2

    def __init__(
        self,
        layers: Layers | None = None,
        dbf_format_version: int | None = None,
        bits_per_weight: float | None = None,
        fused_experts: list[str] | None = None,
        tables: Tables | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        # Programs that know no tables read version 2.
        self.dbf_format_version = VERSIONS[bool(tables)] if dbf_format_version is None else dbf_format_version
        self.bits_per_weight = bits_per_weight
        self.layers = {} if layers is None else layers
        self.fused_experts = [] if fused_experts is None else fused_experts
        if tables:
            self.tables = tables
        self.post_init()

    def post_init(self) -> None:
        """Check all fields; they come from a file.

        Raises:
            CheckpointError: a newer version, or a table of layers that no compression wrote.
        """
        if self.dbf_format_version not in VERSIONS:
            raise CheckpointError(
                f"config.json: dbf_format_version={self.dbf_format_version!r}",
                f"dbf_format_version={' or '.join(map(str, VERSIONS))}",
                "update dbf_compile",
            )
        if not isinstance(self.layers, Mapping):
            raise CheckpointError(
                f"config.json: layers of type {type(self.layers).__name__}", "a dictionary", DAMAGED
            )
        check_entries(self.tables)
        if not _are_names(self.fused_experts):
            raise CheckpointError(
                f"config.json: fused_experts={self.fused_experts!r}", "a list of names of modules", DAMAGED
            )
        for name, entry in self.layers.items():
            size = entry.get("mid_features") if isinstance(entry, Mapping) else None
            if type(size) is not int or size < 1:
                raise CheckpointError(
                    f"config.json: layer {name!r}: {entry!r}", "mid_features of 1 or more", DAMAGED
                )
            if entry.get("scale_dtype", "float16") not in SCALES:
                raise CheckpointError(
                    f"config.json: layer {name!r}: {entry!r}",
                    f"scale_dtype of {', '.join(SCALES)}",
                    DAMAGED,
                )
            shared = entry.get("shares_first_stage_with")
            owner = self.layers.get(name if shared is None else str(shared))
            if (
                not isinstance(owner, Mapping)
                or owner.get("shares_first_stage_with") is not None
                or owner.get("mid_features") != size
            ):
                raise CheckpointError(
                    f"config.json: layer {name!r}: {entry!r}",
                    "a first stage of its own, or that of a layer of equal mid_features that has one",
                    DAMAGED,
                )


class DBFQuantizer(HfQuantizer):
    """Replaces dense layers by factored ones before ``from_pretrained`` reads their tensors."""

    requires_calibration = True
    quantization_config: DBFConfig
    _tables: Tables = {}  # noqa: RUF012, of a model that is not loaded
    state: Mapping[str, Tensor] | None = None  # what is saved, if it is not the model's own

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

    def update_device_map(self, device_map: Any) -> Any:
        """Return a copy of a map by names: layers that share their first stage are put on one side of it."""
        return dict(device_map) if isinstance(device_map, dict) else device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Look at the index of the weight files; nothing is known before of where the model comes from."""
        check_index(getattr(config, "name_or_path", ""))
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_content(kwargs.get("checkpoint_files") or ())
        config = self.quantization_config
        linearize_experts_(model, keep=experts_in(model, config.fused_experts))
        files = kwargs.get("checkpoint_files") or ()
        self._layers = layers_in(model, config.layers, files)
        self._tables = tables_of_folder(model, config.tables, files, self._layers)
        insert_layers_(model, self._layers)
        insert_tables_(model, self._tables)
        vars(model)[_PLANS] = partial(_whole_plans, model)
        if isinstance(kwargs.get("device_map"), dict):
            keep_together_(kwargs["device_map"], self._layers)
            keep_together_(kwargs["device_map"], self._tables, "shares_rows_with")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        vars(model).pop(_PLANS, None)
        _refuse_split(getattr(model, "_tp_size", None))
        finish_layers_(model, self._layers)
        finish_tables_(model, self._tables)
        self.quantization_config = record_(model) or self.quantization_config
        if type(model).__module__.startswith("transformers."):
            # Saved again, its folder will be without the code that this names; remote code is saved with its model.
            vars(model.config).pop("auto_map", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that ``save_pretrained`` works: tensors are stored under the names they have in the model."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what is saved: shared first stages once, and an empty weight for each factored layer."""
        state = {
            # Linearized experts may be transposed views.
            name: tensor.contiguous() if isinstance(tensor, Tensor) else tensor
            for name, tensor in (model.state_dict() if self.state is None else self.state).items()
        }
        for name, entry in self.quantization_config.layers.items():
            if entry["shares_first_stage_with"] is not None:
                for tensor in FIRST_STAGE:
                    state.pop(f"{name}.{tensor}", None)
            layer: Any = model.get_submodule(name)
            state[f"{name}.{WEIGHT_PLACEHOLDER}"] = torch.empty(
                layer.out_features, 0, dtype=layer.weight_dtype
            )
        save_tables_(state, self.quantization_config.tables)
        return state, {}

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top; the factors themselves are constants."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer takes the model without adapters: a new head and all that is dense can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True


def _whole_plans(model: Any, distributed: Any) -> Any:
    """Return a model's plans of parallelism, unless they split layers."""
    _refuse_split(getattr(distributed, "tp_size", None))
    if (getattr(distributed, "fsdp_size", None) or 1) > 1 and table_layers(model):
        # The empty weight of a table has another shape in a shard of FSDP than where transformers cuts it.
        raise ConversionError(
            "FSDP of transformers for a folder with quantized tables",
            "a model that is loaded whole, and sharded then",
            "leave out distributed_config, and call torch.distributed.fsdp.fully_shard",
        )
    return getattr(type(model), _PLANS)(model, distributed)


def _refuse_split(processes: int | None) -> None:
    """Refuse tensor parallelism: slices of a weight are no slices of its factors."""
    if processes is not None and processes > 1:
        raise ConversionError(
            f"tensor parallelism of transformers over {processes} processes for a compressed folder",
            "whole models, device_map, FSDP, or vLLM, which splits factored layers",
            "leave out tp_plan and tp_size",
        )


def tables_of_folder(
    model: nn.Module, tables: Tables, files: Sequence[str], layers: Layers
) -> dict[str, dict[str, Any]]:
    """Return the entries of a folder's tables that a model has, under the names that they have in it.

    Args:
        model: dense, of transformers, on the meta device.
        tables: entries of the folder.
        files: weight files of the folder; none where the tensors come from elsewhere.
        layers: table of the factored layers, under their names in the model.
    """
    rename = in_model(model, (name + TENSOR for name in {**embeddings(model), **linears(model)}))
    return tables_in(model, tables, stored_rows_of(files, TENSOR), rename, layers)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


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


def record_(model: Any) -> DBFConfig | None:
    """Make ``config.quantization_config`` of a model of transformers say which of its layers are factored, in place.

    Returns:
        The configuration; None where the model has no factored layer and no linearized experts.

    Raises:
        ConversionError: the model is quantized by another method, too.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoubleBinaryLinear)}
    tables = entries_of(model)
    method = quantization_method(model.config)
    if not layers and not tables and not any(isinstance(module, Experts) for module in model.modules()):
        if method == METHOD:
            quantize_config_(model.config, None)
        return None
    if method not in (None, METHOD):
        raise ConversionError(
            f"factored layers in a model that is quantized by {method}",
            "one method of quantization",
            "convert a dense model",
        )
    known_ties = without_ties(getattr(model, "all_tied_weights_keys", None) or {}, tables)
    replaced = {f"{name}.{tensor}" for name in layers for tensor in (*FIRST_STAGE, WEIGHT_PLACEHOLDER)}
    ties = {key: owner for key, owner in known_ties.items() if key not in replaced}
    table: dict[str, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        owner = _layer_of(known_ties.get(f"{name}.signs_in", ""))
        if owner not in layers or not _has_same_stage(layer, layers[owner]):
            owner = owners.setdefault(id(layer.signs_in), name)
        elif owner in table:
            owner = table[owner]["shares_first_stage_with"] or owner
        table[name] = _entry(layer, None if owner == name else owner)
        if owner != name:
            ties |= {f"{name}.{tensor}": f"{owner}.{tensor}" for tensor in FIRST_STAGE}
    model.all_tied_weights_keys = ties | ties_of(tables)
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    config = DBFConfig(table, bits_per_weight=_bits(layers, table), fused_experts=fused, tables=tables)
    quantize_config_(model.config, config)
    return config


def quantization_method(config: Any) -> str | None:
    """Return how the model of a configuration is quantized, or None if it is not."""
    known = getattr(config, "quantization_config", None)
    return known.get("quant_method") if isinstance(known, dict) else getattr(known, "quant_method", None)


def quantize_config_(config: Any, quantization: DBFConfig | None) -> None:
    """Set or delete ``quantization_config`` in the configuration of a model and in those of its parts, in place.

    A class for a part of a model, such as the tower of CLIP, reads nothing else of config.json.
    """
    if quantization is not None:
        config.quantization_config = quantization
    else:
        vars(config).pop("quantization_config", None)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            quantize_config_(part, quantization)


def _has_same_stage(layer: DoubleBinaryLinear, owner: DoubleBinaryLinear) -> bool:
    """Return whether two layers that shared their first stage still do. Who offloads tensors gives back others, equal ones."""
    if layer.signs_in.device != owner.signs_in.device:
        return False
    stages = [(getattr(layer, tensor), getattr(owner, tensor)) for tensor in FIRST_STAGE]
    return all(one is other or one.is_meta or torch.equal(one, other) for one, other in stages)


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def _entry(layer: DoubleBinaryLinear, owner: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"mid_features": layer.mid_features, "shares_first_stage_with": owner}
    if layer.scale_out.dtype != torch.float16:
        entry["scale_dtype"] = str(layer.scale_out.dtype).removeprefix("torch.")
    return entry


def _bits(layers: Mapping[str, DoubleBinaryLinear], table: Layers) -> float | None:
    """Return stored bits per weight of factored layers."""
    stored = [
        getattr(layer, tensor)
        for name, layer in layers.items()
        for tensor in TENSOR_NAMES
        if tensor not in FIRST_STAGE or table[name]["shares_first_stage_with"] is None
    ]
    size = sum(layer.in_features * layer.out_features for layer in layers.values())
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in stored) / size if size else None


# Importing this file is what registers; it happens once.
register_quantization_config(METHOD)(DBFConfig)
register_quantizer(METHOD)(DBFQuantizer)
