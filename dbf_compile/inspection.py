"""A look into the folder of a model, without loading it: what is compressed, how, and whether its files are whole."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from dbf_compile.compression.coverage import coverage
from dbf_compile.errors import CheckpointError, DBFError
from dbf_compile.factors import stored_bits
from dbf_compile.integrations import pretrained
from dbf_compile.integrations.experts import unfuse_
from dbf_compile.integrations.transformers import METHOD, DBFConfig, insert_layers_
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.options import CompressionConfig, parse
from dbf_compile.run.report import report_of

_DAMAGED = "the folder is damaged: compress the model again, or copy it again"


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """Return what of a model is compressed, from its configuration and the headers of its files.

    Args:
        path: folder of a compressed model, or its name on the Hub.

    Returns:
        "model", "share" of the weights that is factored, "factored" and "file": bits per weight, "dense": what is not
        factored and why, and "layers": name, shape, ``mid_features``, bits and, where the report has it, error.

    Raises:
        CheckpointError: not compressed, or damaged.
    """
    folder = pretrained.local_folder(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    given = getattr(config, "quantization_config", None)
    if not isinstance(given, dict) or given.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder}, which is not compressed",
            "a folder written by dbf_compile.compress",
            "compress it first",
        )
    table = DBFConfig.from_dict(given).layers
    kind = pretrained.model_class(config)
    del config.quantization_config
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    unfuse_(model)
    report = report_of(folder)
    covered = coverage(model, set(table), _settings(report))
    insert_layers_(model, table)
    size = _check_files(folder, model)
    errors = _errors(report)
    rows, stored, weights = [], 0, 0
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():  # configurations are sorted by name when they are saved
        if isinstance(module, DoubleBinaryLinear):
            groups.setdefault(table[name]["shares_first_stage_with"] or name, []).append(name)
    for names in groups.values():
        layers = [model.get_submodule(name) for name in names]
        first = layers[0]
        assert isinstance(first, DoubleBinaryLinear)
        out_features = sum(layer.out_features for layer in layers)
        bits = stored_bits(first.in_features, first.mid_features, out_features)
        stored, weights = stored + bits, weights + out_features * first.in_features
        joined = " + ".join(names)
        rows.append(
            {
                "name": joined,
                "shape": [out_features, first.in_features],
                "mid_features": first.mid_features,
                "bits_per_weight": bits / (out_features * first.in_features),
                "error": errors.get(joined),
            }
        )
    return {
        "model": str(path),
        "share": covered["share"],
        "factored": stored / max(1, weights),
        "file": 8 * size / covered["weights"],
        "dense": covered["dense"],
        "layers": rows,
    }


def _settings(report: dict[str, Any]) -> CompressionConfig:
    """Return the settings that decided which layers stay dense, as far as the report has them."""
    given: Any = report.get("settings")
    names = {item.name for item in fields(CompressionConfig)}
    try:
        return parse(CompressionConfig, {key: given[key] for key in names & {*given}})
    except (DBFError, TypeError):
        return CompressionConfig()


def _errors(report: dict[str, Any]) -> dict[str, float]:
    try:
        return {row["name"]: row["error"] for row in report["layers"]}
    except (KeyError, TypeError):
        return {}


def _check_files(folder: Path, model: torch.nn.Module) -> int:
    """Return the bytes of the weight files after comparing names and shapes with what the model needs."""
    found: dict[str, tuple[int, ...]] = {}
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}", "a whole safetensors file", _DAMAGED) from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        if name not in tied and found.get(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name!r} of shape {found.get(name)}", f"shape {tuple(tensor.shape)}", _DAMAGED
            )
    return size
