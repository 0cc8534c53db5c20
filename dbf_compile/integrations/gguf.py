"""GGUF files of llama.cpp: dequantized once by transformers, into a folder of safetensors in the user's cache.

    <cache>/gguf/<hash of content and program>/model/            as save_pretrained writes it, tokenizer and chat template included
                                               gguf_source.json    {"type": such as "Q4_1", "bits": per weight}

From there on the model is a folder like any other. Weights become bfloat16; a file of 32-bit weights keeps them. transformers leaves out
without a word what it does not know of a file: what it read is compared with what is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.files import cache_folder, new_folder_mode, write_text
from dbf_compile.integrations.bars import bars_of_gguf
from dbf_compile.integrations.gguf_header import SOURCE, Header, cut_short, damaged, read_header
from dbf_compile.integrations.gguf_settings import (
    ROPE_FACTORS,
    adapt_config_,
    adapt_tokenizer_,
    check_rope,
    generation_settings,
)
from dbf_compile.integrations.opening import loaded, refuse_others

_FORMAT = 1
_MODEL = "model"
_PACKAGES = ("gguf", "accelerate", "sentencepiece")
_ORIGINAL = "compress the model that the file was made from: its folder, or its name on the Hub"
_NO_VOCABULARY = ("none", "no_vocab")


def dense_folder(path: Path) -> Path:
    """Return the folder of a GGUF file's model; it is written where it is not in the cache yet.

    Raises:
        ConversionError: a package is missing, or the file is none that transformers reads whole.
        CheckpointError: the file is damaged, or the cache cannot be written.
    """
    _check_packages(path)
    header = read_header(path)
    _check_content(path, header)
    place = cache_folder() / "gguf" / _key(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            if not (place / SOURCE).is_file():
                _check_room(path, header, place)
                _write(path, header, place)
    except OSError as error:
        raise CheckpointError(
            f"{place}: {error}",
            "a cache folder that can be written, with room for the model in 16 bits",
            "make room, or set DBF_CACHE_DIR to another folder",
        ) from error
    return place / _MODEL


def _check_packages(path: Path) -> None:
    missing = []
    for name in _PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ConversionError(
            f"{path}, a GGUF file, without the packages {', '.join(missing)}",
            "packages that read it",
            "pip install 'dbf-compile[gguf]'",
        )


def _check_content(path: Path, header: Header) -> None:
    """Refuse a file whose end is missing, or whose types of tensors nobody knows."""
    import gguf

    end = header.content
    for tensor in header.tensors:
        try:
            count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        except (KeyError, ValueError):
            raise ConversionError(
                f"{path} with {tensor.name!r} of type {tensor.kind}",
                "types that the package gguf knows",
                f"update it, or {_ORIGINAL}",
            ) from None
        if not tensor.shape or tensor.shape[-1] % count:
            raise damaged(path, f"{tensor.name!r} of shape {tensor.shape}")
        weights = 1
        for axis in tensor.shape:
            weights *= axis
        end = max(end, header.content + tensor.offset + weights // count * size)
    if end > header.size:
        raise cut_short(path, f"{header.size:,} bytes of {end:,}")


def _key(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{_FORMAT} {transformers.__version__} {version('gguf')}".encode())
    return digest.hexdigest()[:32]


def _check_room(path: Path, header: Header, place: Path) -> None:
    needed = header.weights * _dtype(header).itemsize
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{path}, to be dequantized in {place}, where {free:,} bytes are free",
            f"{needed:,} bytes at the least",
            "make room, or set DBF_CACHE_DIR to another folder",
        )


def _dtype(header: Header) -> torch.dtype:
    return torch.float32 if _type_of(header) == "F32" else torch.bfloat16


def _type_of(header: Header) -> str:
    """Return the type of a file by llama.cpp's name, or else that of most of its weights."""
    import gguf

    try:
        name = gguf.LlamaFileType(header.metadata.get("general.file_type", -1)).name
        return str(name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        counts: Counter[int] = Counter()
        for tensor in header.tensors:
            counts[tensor.kind] += tensor.shape[0] * tensor.shape[-1] if len(tensor.shape) > 1 else 0
        return str(gguf.GGMLQuantizationType(counts.most_common(1)[0][0]).name)


def _write(path: Path, header: Header, place: Path) -> None:
    """Dequantize a file into a folder beside its place, and move it there whole; ``source.json`` comes last."""
    folder = Path(tempfile.mkdtemp(dir=place, prefix=f".{_MODEL}."))
    try:
        model = _dequantized(path, header)
        model.save_pretrained(folder)
        tokenizer = _tokenizer(path, header)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        folder.chmod(new_folder_mode())
        shutil.rmtree(place / _MODEL, ignore_errors=True)
        folder.rename(place / _MODEL)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bits = 8 * (header.size - header.content) / header.weights
    write_text(place / SOURCE, json.dumps({"type": _type_of(header), "bits": bits}) + "\n")


def _dequantized(path: Path, header: Header) -> Any:
    place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        config = transformers.AutoConfig.from_pretrained(**place)
        kind = _class_for(config)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConversionError(
            f"{path} of architecture {header.architecture!r}, which transformers {transformers.__version__} does not read ({text})",
            "an architecture whose GGUF files it reads",
            _ORIGINAL,
        ) from error
    factors = _rope_factors(path)
    adapt_config_(config, path, header, factors)
    quantization = getattr(transformers, "GgufConfig", None)  # of versions that may leave weights quantized
    options = {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    with bars_of_gguf():
        model, info = loaded(
            kind, path.parent, gguf_file=path.name, config=config, dtype=_dtype(header), **options
        )
    refuse_others(str(path), info, CheckpointError)
    _check_whole(path, header, model)
    check_rope(path, model, factors)
    model.generation_config.update(**generation_settings(header))
    vars(model.config).pop("_model_name_or_path", None)  # the name in the file, which is no place
    return model


def _rope_factors(path: Path) -> torch.Tensor | None:
    """Return what a file divides its rotary frequencies by, or None where it has nothing of that kind."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == ROPE_FACTORS:
            return torch.tensor(tensor.data.tolist(), dtype=torch.float32)
    return None


def _class_for(config: Any) -> Any:
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel


def _check_whole(path: Path, header: Header, model: Any) -> None:
    """Refuse a file of which transformers has left out tensors, and one whose content is no numbers."""
    tied = {name for name in model.all_tied_weights_keys if name.endswith("lm_head.weight")}
    left_out = {ROPE_FACTORS, *(["output.weight"] if tied else [])}
    stored = header.weights - sum(
        tensor.shape[0] * tensor.shape[-1] if len(tensor.shape) > 1 else tensor.shape[0]
        for tensor in header.tensors
        if tensor.name in left_out
    )
    read = sum(parameter.numel() for parameter in model.parameters())
    if read != stored:
        raise ConversionError(
            f"{path} with {stored:,} weights, of which {type(model).__name__} of transformers reads {read:,}",
            "files that it reads whole",
            _ORIGINAL,
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise damaged(path, f"{name} with values that are no numbers")


def _tokenizer(path: Path, header: Header) -> Any:
    if header.metadata.get("tokenizer.ggml.model", "none") in _NO_VOCABULARY:
        warnings.warn(f"{path} has no vocabulary: its model comes without a tokenizer", stacklevel=2)
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConversionError(
            f"{path}, whose vocabulary transformers {transformers.__version__} does not read ({text})",
            "a vocabulary that it reads",
            _ORIGINAL,
        ) from error
    return adapt_tokenizer_(tokenizer, path, header)
