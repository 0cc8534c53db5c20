"""Folders of pretrained models: opened without reading the weights, and written shard by shard.

transformers leaves the tensors of a safetensors file mapped where the dtype is that of the file. An open model therefore
takes no memory of its own: weights are read from the disk when they are used.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from dbf_compile.checkpoint import write_tensors
from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.factors import (
    FIRST_STAGE,
    SIGN_NAMES,
    TENSOR_NAMES,
    DoubleBinaryFactors,
    factor_dtypes,
    factor_shapes,
)
from dbf_compile.files import write_text
from dbf_compile.integrations.experts import linearize_experts_
from dbf_compile.integrations.transformers import METHOD, DBFConfig, Layers, insert_layers_
from dbf_compile.linear import WEIGHT_PLACEHOLDER, dense_weight
from dbf_compile.signs import interleave

_WEIGHTS = "model.safetensors"
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
# What belongs to a model besides its weights and its config.json.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)

Piece = tuple[str, int, Callable[[], Tensor]]  # name, bytes, and a function that returns the tensor


def local_folder(path: str | Path) -> Path:
    """Return the folder of a model: ``path`` itself, or the download of the Hub's model of that name.

    Raises:
        ConversionError: there is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:  # no such name, no network, no permission
        raise ConversionError(
            f"{str(path)!r}: {str(error).splitlines()[0]}",
            "the folder of a pretrained model, or a name on the Hub such as 'Qwen/Qwen3-0.6B'",
            "check the path",
        ) from error


def open_dense(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of a folder in evaluation mode, as the class its configuration names, in the dtype of its files.

    Raises:
        ConversionError: no model is there, or a compressed one.
        CheckpointError: its files are damaged.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} without config.json", "the folder of a pretrained model", "check the path"
        )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if (getattr(config, "quantization_config", None) or {}) != {}:
        raise ConversionError(
            f"{folder}, which is quantized already", "a dense model", "compress the model it was made from"
        )
    kind = model_class(config)
    try:
        model: nn.Module = kind.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({error})", "a whole, undamaged model", "download it again"
        ) from error
    return model.eval().requires_grad_(False)


def open_any(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the model of a folder, compressed or not, in evaluation mode, in the dtype of its files."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is None:
        return open_dense(folder, trust_remote_code)
    kind = model_class(config)
    return kind.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()


def empty_compressed(folder: Path) -> tuple[nn.Module, nn.Module, Layers]:
    """Return the model of a compressed folder on the meta device, dense and factored, and the table of its layers.

    Raises:
        CheckpointError: the folder is not compressed, or its table does not fit the model.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder}, which is not compressed",
            "a folder written by dbf_compile.compress",
            "compress it first",
        )
    layers = DBFConfig.from_dict(quantization).layers
    del config.quantization_config
    kind = model_class(config)
    models = []
    for _ in range(2):
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        linearize_experts_(model)
        models.append(model)
    insert_layers_(models[1], layers)
    return models[0], models[1], layers


def compile_options(backend: str, device: torch.device) -> dict[str, Any]:
    """Return arguments of ``generate`` for a static cache and compiled decoding on any device."""
    config: Any = transformers.CompileConfig(
        backend=backend,
        mode="reduce-overhead" if device.type == "cuda" else None,
        fullgraph=False,
        dynamic=False,
    )
    config._compile_all_devices = True  # transformers leaves the CPU out otherwise
    return {"cache_implementation": "static", "compile_config": config}


class _TimedStreamer(transformers.TextStreamer):
    """Passes text on as it is generated, and notes the time of every token."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream
        self._prompted = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then one token after the other."""
        if self._prompted:
            self.times.append(time.perf_counter())
        self._prompted = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on text that is final."""
        if self._stream is not None:
            self._stream(text)


def timed_streamer(tokenizer: Any, stream: Callable[[str], object] | None) -> _TimedStreamer:
    """Return a streamer for ``generate`` that notes the time of every new token in ``times``."""
    return _TimedStreamer(tokenizer, stream)


def tokenizer_of(folder: Path | None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in the folder of a model.

    Raises:
        ConversionError: there is none.
    """
    try:
        if folder is not None:
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        reason = "a model without a folder"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConversionError(
        f"text without a tokenizer ({reason})", "a tokenizer for the text", "pass tokenizer=..."
    )


def model_class(config: Any) -> Any:
    """Return the first class that a configuration names, or AutoModelForCausalLM if it names none."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def content_hash(folder: Path) -> str:
    """Return a hash of the configuration and all weight files of a folder."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class CompressedModel:
    """A compressed model that is to be written.

    Args:
        model: dense, of transformers, its experts linearized.
        layers: table of the factored layers, as of :class:`DBFConfig`.
        factors: returns those of a layer.
        bits_per_weight: of the factored layers, for the record.
        source: the folder the model comes from, whose tokenizer and other companions are copied.
        tokenizer: to save where there is no source.
    """

    model: nn.Module
    layers: Layers
    factors: Callable[[str], DoubleBinaryFactors]
    bits_per_weight: float
    source: Path | None = None
    tokenizer: Any = None


def write_model(folder: Path, compressed: CompressedModel, max_shard_size: int) -> int:
    """Write a compressed model as a folder that ``from_pretrained`` loads; at most one shard is in memory at a time.

    Args:
        folder: where to, an empty folder.
        compressed: the dense model and its factors.
        max_shard_size: bytes of a file; a tensor that is larger gets a file of its own.

    Returns:
        The bytes of the weight files.
    """
    shards = list(_shards(_pieces(compressed), max_shard_size))
    places: dict[str, str] = {}
    written = 0
    for number, shard in enumerate(shards, 1):
        name = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors({key: make() for key, _, make in shard}, {"format": "pt"}, folder / name)
        places.update(dict.fromkeys((key for key, _, _ in shard), name))
        written += (folder / name).stat().st_size
    if len(shards) > 1:
        total = sum(size for shard in shards for _, size, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_text(folder / f"{_WEIGHTS}.index.json", json.dumps(index, indent=1))
    quantization = DBFConfig(compressed.layers, bits_per_weight=compressed.bits_per_weight)
    _write_config(folder, compressed.model, quantization)
    _write_companions(folder, compressed)
    return written


def _write_companions(folder: Path, compressed: CompressedModel) -> None:
    """Copy what belongs to the model besides weights and config.json, or save its tokenizer."""
    if compressed.source is not None:
        for pattern in _COMPANIONS:
            for path in compressed.source.glob(pattern):
                if path.is_file() and not path.name.endswith(".safetensors"):
                    shutil.copyfile(path, folder / path.name)
    elif hasattr(compressed.tokenizer, "save_pretrained"):
        compressed.tokenizer.save_pretrained(folder)


def _pieces(compressed: CompressedModel) -> Iterator[Piece]:
    model, layers = compressed.model, compressed.layers
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if name in tied:
            continue
        if layer not in layers or kind != WEIGHT_PLACEHOLDER:
            yield name, tensor.numel() * tensor.element_size(), _copy_of(tensor)
            continue
        yield (
            name,
            0,
            _copy_of(torch.empty(len(dense_weight(model.get_submodule(layer))), 0, dtype=tensor.dtype)),
        )
        entry = layers[layer]
        shared = entry["shares_first_stage_with"] is not None
        kept = [part for part in TENSOR_NAMES if not (shared and part in FIRST_STAGE)]
        for part in kept:
            yield (
                f"{layer}.{part}",
                _part_size(part, model.get_submodule(layer), entry["mid_features"]),
                _part_of(compressed.factors, layer, part),
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


def _write_config(folder: Path, model: Any, quantization: DBFConfig) -> None:
    config = model.config
    architecture = type(model).__name__
    content = {**json.loads(config.to_json_string()), "architectures": [architecture]}
    content.pop("_name_or_path", None)  # a path of this machine
    content["quantization_config"] = {
        key: value for key, value in vars(quantization).items() if not key.startswith("_")
    }
    content["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    is_ours = type(model).__module__.startswith("transformers.")  # other code cannot be imported by ours
    if is_ours:
        content["auto_map"] = {"AutoConfig": "configuration_dbf.DBFModelConfig"}
        content["auto_map"] |= dict.fromkeys(_auto_classes(model), "modeling_dbf.DBFModel")
    write_text(folder / "config.json", json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if is_ours:
        classes = {"config": type(config).__name__, "model": architecture}
        write_text(folder / "configuration_dbf.py", _CONFIGURATION.format(**classes))
        write_text(folder / "modeling_dbf.py", _MODELING.format(**classes))


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
