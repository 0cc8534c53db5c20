"""The folder of a compressed model: weights shard by shard, configuration, code, and the files that belong to the model."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto

from dbf_compile.checkpoint import write_tensors
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.factors import (
    FIRST_STAGE,
    SIGN_NAMES,
    TENSOR_NAMES,
    DoubleBinaryFactors,
    factor_dtypes,
    factor_shapes,
)
from dbf_compile.files import write_text
from dbf_compile.integrations.companions import CODE, copy_companions
from dbf_compile.integrations.content import CONFIG, HASH, QUANTIZATION, content_hash, content_header
from dbf_compile.integrations.loading import Layers
from dbf_compile.integrations.renaming import in_files, table_in_files
from dbf_compile.integrations.tables import entries, renamed, table_pieces
from dbf_compile.integrations.transformers import DBFConfig, quantize_config_
from dbf_compile.linear import WEIGHT_PLACEHOLDER, dense_weight
from dbf_compile.progress import over
from dbf_compile.signs import interleave
from dbf_compile.tables import QuantizedRows

_WEIGHTS = "model.safetensors"
_GENERATION = "generation_config.json"

Piece = tuple[str, int, Callable[[], Tensor]]  # name, bytes, and a function that returns the tensor


@dataclass(frozen=True)
class CompressedModel:
    """A compressed model that is to be written.

    Args:
        model: dense, of transformers, its experts linearized.
        layers: table of the factored layers, as of :class:`DBFConfig`.
        factors: returns those of a layer.
        bits_per_weight: of the factored layers, for the record.
        tables: of layers that read quantized rows; layers of one weight and kind have the same.
        source: the folder the model comes from, whose tokenizer and other companions are copied.
        tokenizer: to save where there is no source.
    """

    model: nn.Module
    layers: Layers
    factors: Callable[[str], DoubleBinaryFactors]
    bits_per_weight: float
    source: Path | None = None
    tokenizer: Any = None
    tables: Mapping[str, QuantizedRows] = field(default_factory=dict)

    @property
    def table_entries(self) -> dict[str, dict[str, Any]]:
        """Entries of the tables in config.json."""
        kinds = {name: table.kind for name, table in self.tables.items()}
        return entries(kinds, lambda name: id(self.tables[name]))


def write_model(
    folder: Path, compressed: CompressedModel, max_shard_size: int, progress: bool = False
) -> int:
    """Write a compressed model as a folder that ``from_pretrained`` loads; at most one shard is in memory at a time.

    Args:
        folder: where to, an empty folder.
        compressed: the dense model and its factors.
        max_shard_size: bytes of a file; a tensor that is larger gets a file of its own.
        progress: show a bar.

    Returns:
        The bytes of the weight files.
    """
    table = table_in_files(compressed.model, compressed.layers)
    tables = renamed(compressed.table_entries, in_files(compressed.model))
    quantization = DBFConfig(table, bits_per_weight=compressed.bits_per_weight, tables=tables)
    config = _write_settings(folder, compressed, quantization)
    header = {"format": "pt", **content_header(config)}
    shards = list(_shards(_pieces(compressed), max_shard_size))
    places: dict[str, str] = {}
    for number, shard in enumerate(over(shards, "writing", "file", progress), 1):
        name = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors({key: make() for key, _, make in shard}, header, folder / name)
        places.update(dict.fromkeys((key for key, _, _ in shard), name))
    if len(shards) > 1:
        total = sum(size for shard in shards for _, size, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_text(folder / f"{_WEIGHTS}.index.json", json.dumps(index, indent=1))
    files = [folder / name for name in dict.fromkeys(places.values())]
    config[QUANTIZATION][HASH] = content_hash(files)
    _write_json(folder / CONFIG, config)
    return sum(path.stat().st_size for path in files)


def check_saving(model: nn.Module, source: Path | None, tokenizer: Any, place: Path) -> None:
    """Write all of a model but its weights to a temporary folder, and remove it.

    Args:
        model: dense, of transformers.
        source, tokenizer: as of :class:`CompressedModel`.
        place: the folder in which the model will be written.

    Raises:
        OptionError: the place cannot be written.
        ConversionError: transformers refuses to save the model.
    """
    try:
        folder = tempfile.TemporaryDirectory(dir=place, prefix=".dbf-compile.")
    except OSError as error:
        raise _no_place(place, error) from error
    no_factors: dict[str, DoubleBinaryFactors] = {}
    compressed = CompressedModel(model, {}, no_factors.__getitem__, 0.0, source, tokenizer)
    with folder as path:
        try:
            _write_settings(Path(path), compressed, DBFConfig())
        except Exception as error:  # of a tokenizer, a configuration or code that is not ours
            if isinstance(error, OSError) and error.errno is not None:
                raise _no_place(place, error) from error
            raise ConversionError(
                f"{type(model).__name__}, which cannot be saved ({' '.join(str(error).split())})",
                "a model whose configuration, generation settings and tokenizer transformers saves",
                "call save_pretrained on the model until it works",
            ) from error


def _no_place(place: Path, error: OSError) -> OptionError:
    return OptionError(
        f"output in {place}, which cannot be written ({error.strerror})",
        "a folder of yours, with room",
        "make room, or choose another",
    )


def _write_settings(folder: Path, compressed: CompressedModel, quantization: DBFConfig) -> dict[str, Any]:
    """Write everything but weights; return the content of config.json."""
    model: Any = compressed.model
    config = copy.deepcopy(model.config)
    if compressed.source is not None:
        copy_companions(compressed.source, folder)
    else:
        if hasattr(compressed.tokenizer, "save_pretrained"):
            compressed.tokenizer.save_pretrained(folder)
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
            if config._auto_class is not None:
                custom_object_save(config, folder, config=config)
    if not (folder / _GENERATION).exists() and model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    quantize_config_(config, quantization)
    content = _config_content(model, config, quantization)
    _write_json(folder / CONFIG, content)
    if _is_of_transformers(model):
        classes = {"config": type(config).__name__, "model": type(model).__name__}
        for name, text in zip(CODE, (_CONFIGURATION, _MODELING), strict=True):
            write_text(folder / name, text.format(**classes))
    return content


def _config_content(model: Any, config: Any, quantization: DBFConfig) -> dict[str, Any]:
    content = {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}
    content.pop("_name_or_path", None)  # a path of this machine
    content[QUANTIZATION] = {
        key: value for key, value in vars(quantization).items() if not key.startswith("_")
    }
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    if _is_of_transformers(model):  # other code cannot be imported by ours
        content["auto_map"] = {"AutoConfig": "configuration_dbf.DBFModelConfig"}
        content["auto_map"] |= dict.fromkeys(_auto_classes(model), "modeling_dbf.DBFModel")
    result: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return result


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _is_of_transformers(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.")


def _pieces(compressed: CompressedModel) -> Iterator[Piece]:
    model, layers = compressed.model, compressed.layers
    tensors, rename = model.state_dict(), in_files(model)
    tables = compressed.table_entries
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind == WEIGHT_PLACEHOLDER:
            for part, size, make in _layer_pieces(compressed, layer, tensor.dtype):
                yield rename(part), size, make
        elif layer in tables and kind == WEIGHT_PLACEHOLDER:
            for part, size, make in table_pieces(
                layer, compressed.tables[layer], tables[layer], tensor.dtype
            ):
                yield rename(part), size, make
        elif not (name in ties and ties[name] in tensors and _is_same(tensor, tensors[ties[name]])):
            # A tensor that from_pretrained does not tie again is stored under all its names.
            yield rename(name), tensor.numel() * tensor.element_size(), _copy_of(tensor)


def _layer_pieces(compressed: CompressedModel, layer: str, dtype: torch.dtype) -> Iterator[Piece]:
    dense, entry = compressed.model.get_submodule(layer), compressed.layers[layer]
    rows = len(dense_weight(dense))
    yield f"{layer}.{WEIGHT_PLACEHOLDER}", 0, _copy_of(torch.empty(rows, 0, dtype=dtype))
    shared = entry["shares_first_stage_with"] is not None
    for part in TENSOR_NAMES:
        if not (shared and part in FIRST_STAGE):
            size = _part_size(part, dense, entry["mid_features"])
            yield f"{layer}.{part}", size, _part_of(compressed.factors, layer, part)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same memory, read the same way."""
    return (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() == other.storage_offset()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    )


def _copy_of(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor.detach().to("cpu", copy=True).contiguous()


def _part_of(factors: Callable[[str], DoubleBinaryFactors], layer: str, part: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = factors(layer).tensors()[part]
        return interleave(tensor) if part in SIGN_NAMES else tensor.clone().contiguous()

    return make


def _part_size(part: str, layer: nn.Module, mid_features: int) -> int:
    out_features, in_features = dense_weight(layer).shape
    shape = factor_shapes(in_features, mid_features, out_features)[part]
    return math.prod(shape) * factor_dtypes()[part].itemsize


def _shards(pieces: Iterable[Piece], max_shard_size: int) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + piece[1] > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece[1]
    if shard:
        yield shard


def _auto_classes(model: Any) -> list[str]:
    """Return the names of the Auto classes of transformers that build the class of ``model`` from its configuration."""
    names = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(model.config) in mapping:
            kinds = mapping[type(model.config)]
            if type(model) in (kinds if isinstance(kinds, (tuple, list)) else (kinds,)):
                names.append(name)
    return names


# What transformers runs for ``trust_remote_code=True``. It looks for the packages that are imported here, and says which
# one is to be installed.
_CONFIGURATION = '''"""Loads where dbf_compile is installed but not imported: importing it registers the quantizer."""

import dbf_compile  # noqa: F401
from transformers import {config}


class DBFModelConfig({config}):
    """{config} of a model that dbf_compile has compressed."""
'''
_MODELING = '''"""The model class of a folder that dbf_compile has compressed."""

from transformers import {model}

from .configuration_dbf import DBFModelConfig


class DBFModel({model}):
    """{model} with double binary factors."""

    config_class = DBFModelConfig
'''
