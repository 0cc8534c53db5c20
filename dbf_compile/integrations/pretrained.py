"""Pretrained models: opened from folders without reading their weights, or as a folder would give a model in memory back.

transformers leaves the tensors of a safetensors file mapped where the dtype is that of the file. An open model therefore
takes no memory of its own: weights are read from the disk when they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dbf_compile.checksums import listed
from dbf_compile.errors import CheckpointError, ConversionError, DBFError
from dbf_compile.integrations.content import check_method
from dbf_compile.integrations.experts import linearize_experts_
from dbf_compile.integrations.loading import Layers, insert_layers_
from dbf_compile.integrations.opening import loaded, model_class, refuse_others, unreadable
from dbf_compile.integrations.origins import file_type as file_type
from dbf_compile.integrations.origins import local_folder as local_folder
from dbf_compile.integrations.renaming import experts_in, layers_in
from dbf_compile.integrations.tables import insert_tables_
from dbf_compile.integrations.transformers import METHOD, DBFConfig, tables_of_folder
from dbf_compile.linear import DoubleBinaryLinear

_ADAPTER = "adapter_config.json"
_MERGE = "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"


def open_dense(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of a folder in evaluation mode, as the class its configuration names, in the dtype of its files.

    Raises:
        ConversionError: no model is there, or one that is compressed, or has an adapter beside it.
        CheckpointError: its files are damaged, or do not hold the tensors of its class.
    """
    if has_adapter(folder):
        raise _unmerged(folder)
    config = _config_of(folder, trust_remote_code)
    if (getattr(config, "quantization_config", None) or {}) != {}:
        raise ConversionError(
            f"{folder}, which is quantized already", "a dense model", "compress the model it was made from"
        )
    kind = model_class(config, trust_remote_code)
    model, info = loaded(kind, folder, trust_remote_code=trust_remote_code)
    refuse_others(f"{folder} as {type(model).__name__}", info, CheckpointError)
    return _settled(model)


def has_adapter(folder: Path) -> bool:
    """Return whether transformers puts an adapter of PEFT on the model of a folder."""
    return (folder / _ADAPTER).is_file()


def open_any(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the model of a folder, compressed or not, in evaluation mode, in the dtype of its files.

    Raises:
        ConversionError, CheckpointError: as for :func:`open_dense`.
    """
    config = _config_of(folder, trust_remote_code)
    if getattr(config, "quantization_config", None) is None:
        return open_dense(folder, trust_remote_code)
    kind = model_class(config, trust_remote_code)
    return open_as(kind, folder, trust_remote_code=trust_remote_code)


def open_as(kind: Any, folder: Path, **arguments: Any) -> Any:
    """Return the model of a folder as a class of transformers, in evaluation mode, in the dtype of its files.

    Raises:
        CheckpointError: its files are damaged, or do not hold the tensors of the class.
    """
    model, info = loaded(kind, folder, **arguments)
    refuse_others(f"{folder} as {type(model).__name__}", info, CheckpointError)
    return model.eval()


def reopened(model: nn.Module) -> nn.Module:
    """Return a model in memory as ``from_pretrained`` would load it from a folder that it was saved to.

    The result shares the model's tensors. What makes it another one, such as a hook, would be lost in a folder.

    Raises:
        ConversionError: tensors or settings of the model would be lost.
    """
    kind: Any = type(model)
    _refuse_unsaveable(model)
    tensors = dict(model.state_dict())
    devices = {str(tensor.device) for tensor in tensors.values()}
    place = {"device_map": {"": devices.pop()}} if len(devices) == 1 and devices != {"cpu"} else {}
    twin, info = loaded(
        kind,
        None,
        config=model.config,
        state_dict=tensors,
        dtype=model.dtype,
        generation_config=getattr(model, "generation_config", None),
        **place,
    )
    refuse_others(f"a model of type {kind.__name__}", info, ConversionError)
    _refuse_casts(model, twin)
    # How transformers names tensors in files: as where the model came from, and not as in memory.
    vars(twin).pop("_weight_conversions", None)
    vars(twin).update({key: value for key, value in vars(model).items() if key == "_weight_conversions"})
    return _settled(twin)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _unmerged(folder: Path) -> ConversionError:
    return ConversionError(
        f"{folder} with an adapter that is not merged ({_ADAPTER})", "a dense model", _MERGE
    )


def _config_of(folder: Path, trust_remote_code: bool) -> Any:
    if not (folder / "config.json").is_file():
        if has_adapter(folder):
            raise _unmerged(folder)
        raise ConversionError(
            f"{folder} without config.json", "the folder of a pretrained model", "check the path"
        )
    check_method(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except DBFError:
        raise
    except Exception as error:
        raise unreadable(folder, error) from error


def _refuse_unsaveable(model: Any) -> None:
    name = type(model).__name__
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ConversionError(
            f"a model of type {name} with an adapter that is not merged",
            "a dense model",
            "merge it first: model.merge_and_unload()",
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConversionError(
            f"a model of type {name}",
            "a model of transformers, its folder, or its name on the Hub",
            "use dbf_compile.convert_ for other modules",
        )
    is_factored = any(isinstance(module, DoubleBinaryLinear) for module in model.modules())
    if is_factored or (getattr(model.config, "quantization_config", None) or {}) != {}:
        raise ConversionError(
            f"a model of type {name}, which is quantized already",
            "a dense model",
            "compress the model it was made from",
        )
    try:
        model.config.to_json_string()
    except Exception as error:
        raise ConversionError(
            f"{name}, whose configuration cannot be saved ({error})",
            "values that JSON can hold",
            "call save_pretrained on the model until it works",
        ) from error
    strange = [
        key for key, tensor in model.state_dict().items() if not isinstance(tensor, Tensor) or tensor.is_meta
    ]
    if strange:
        raise ConversionError(
            f"a model of type {name} without content for {listed(strange)}",
            "tensors in memory",
            "load the model whole",
        )


def _refuse_casts(model: Any, twin: Any) -> None:
    """Refuse a model of several dtypes: from_pretrained loads all tensors in one, but for those that its class names."""
    loaded = twin.state_dict()
    changed = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in model.state_dict().items()
        if loaded[name].dtype != tensor.dtype and not torch.equal(loaded[name].to(tensor), tensor)
    ]
    if changed:
        raise ConversionError(
            f"a model of dtype {model.dtype} with tensors of others, which a folder does not keep: {listed(changed)}",
            "one dtype for all",
            f"call model.to({model.dtype}), or model.float()",
        )


def _settled(model: Any) -> nn.Module:
    """Return a model for inference whose configuration says what is tied in it."""
    tied = model.all_tied_weights_keys
    if model.get_expanded_tied_weights_keys(all_submodels=True).keys() - tied.keys():
        # from_pretrained has left tensors apart that are to be tied, but differ.
        for config in (model.config, *(getattr(model.config, key, None) for key in model.config.sub_configs)):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    result: nn.Module = model.eval().requires_grad_(False)
    return result


def empty_compressed(folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, nn.Module, Layers]:
    """Return the model of a compressed folder on the meta device, dense and factored, and the table of its layers.

    Raises:
        CheckpointError: the folder is not compressed, or its table does not fit the model.
    """
    config = _config_of(folder, trust_remote_code)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder}, which is not compressed",
            "a folder written by dbf_compile.compress",
            "compress it first",
        )
    stored = DBFConfig.from_dict(quantization)
    del config.quantization_config
    kind = model_class(config, trust_remote_code)
    models = []
    for _ in range(2):
        with torch.device("meta"):
            if hasattr(kind, "from_config"):
                model = kind.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = kind(config)
        linearize_experts_(model, keep=experts_in(model, stored.fused_experts))
        models.append(model)
    layers = layers_in(models[1], stored.layers, ())
    tables = tables_of_folder(models[1], stored.tables, (), layers)
    insert_layers_(models[1], layers)
    insert_tables_(models[1], tables)
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
        if folder is not None and has_adapter(folder) and not (folder / "config.json").is_file():
            raise _unmerged(folder) from error
        reason = str(error)
    raise ConversionError(
        f"text without a tokenizer ({reason})", "a tokenizer for the text", "pass tokenizer=..."
    )


def content_hash(folder: Path) -> str:
    """Return a hash of the configuration, all weight files and all code of a folder."""
    digest = hashlib.sha256()
    files: Iterable[Path] = (
        path for ending in ("safetensors", "bin", "py") for path in folder.glob(f"*.{ending}")
    )
    for path in sorted([folder / "config.json", *files]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
