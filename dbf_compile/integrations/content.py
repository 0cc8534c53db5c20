"""What a compressed folder says of its own content, and the check when it is read.

    model*.safetensors   header: "checksums" of its tensors (:mod:`dbf_compile.checksums`),
                         "config": JSON {field of config.json: its checksum}
    config.json          "quantization_config": {..., "content_hash": of all tensors in all weight files}

Bits that changed, a file that is missing or belongs to another folder, and another table of layers are errors. Another field of
config.json is the user's to change, and gives a warning. ``save_pretrained`` writes none of this, so what it wrote is not
checked.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dbf_compile import checksums
from dbf_compile.errors import CheckpointError
from dbf_compile.factors import SIGN_NAMES
from dbf_compile.tables import ROWS

CONFIG, QUANTIZATION, HASH = "config.json", "quantization_config", "content_hash"
METHOD = "dbf"  # of quantization
_INDEX = "model.safetensors.index.json"
_FIELDS = "config"  # in the header of a weight file
_UNIMPORTANT = ("transformers_version", "_name_or_path", "architectures", "auto_map")
_DO = "copy the folder again, or compress the model again"
_OURS = tuple(f".{name}" for name in (*SIGN_NAMES, ROWS))  # how names of our tensors end


def content_header(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the header of a weight file says of the content of config.json, without its content hash."""
    fields = {key: checksums.text_checksum(value) for key, value in config.items() if key not in _UNIMPORTANT}
    return {_FIELDS: json.dumps(fields)}


def content_hash(files: Iterable[Path]) -> str:
    """Return the hash of all tensors in weight files that have checksums."""
    return checksums.content_hash(map(checksums.stored_checksums, files))


def check_content(files: Sequence[str | os.PathLike[str]]) -> bool:
    """Read the weight files of a compressed folder, and compare them with what was written.

    Args:
        files: all weight files of one folder; such as are no safetensors are not checked.

    Returns:
        Whether all content was compared: a file that was saved again has nothing to compare it with.

    Raises:
        CheckpointError: a file cannot be read, has changed, is missing, or belongs to another folder.
    """
    paths = [Path(file) for file in files if str(file).endswith(".safetensors")]
    if not paths:
        return False
    again = [path for path in paths if not _is_as_written(path)]
    config = _config_beside(paths[0])
    quantization = config.get(QUANTIZATION)
    stored = quantization.get(HASH) if isinstance(quantization, dict) else None
    if stored is None:
        return False
    if again:
        names = checksums.listed([str(path) for path in again])
        warnings.warn(
            f"{names}: saved again since the model was compressed; not compared with what was written",
            stacklevel=2,
        )
        return False
    if content_hash(paths) != stored:
        raise CheckpointError(
            f"{paths[0].parent}: weight files that are not all those that {CONFIG} belongs to{_missing(paths)}",
            f"the files of one compression ({checksums.listed([path.name for path in paths])} were read)",
            _DO,
        )
    _check_config(paths[0], config)
    return True


def check_index(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder whose index of weight files cannot be read.

    Raises:
        CheckpointError: transformers would say that some JSON is damaged, and not which.
    """
    path = Path(folder) / _INDEX
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if any(type(name) is not str for name in index["weight_map"].values()):
            raise ValueError("weight_map with other values than names of files")
        if not isinstance(index["metadata"], dict):
            raise TypeError("metadata that is no dictionary")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {type(error).__name__}: {error}", "the index that was written", _DO
        ) from error


def check_method(folder: Path) -> None:
    """Refuse a folder of compressed weights whose config.json does not name our quantizer.

    No code of ours would be asked: transformers fails in words of its own, or takes the folder for that of a dense model.

    Raises:
        CheckpointError: the table of layers is missing, or nothing that was written.
    """
    config = _config_beside(folder / CONFIG)
    quantization = config.get(QUANTIZATION)
    named = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    if config and not named and any(map(_has_own_tensors, sorted(folder.glob("model*.safetensors")))):
        raise _another_table(folder / CONFIG)


def _has_own_tensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.endswith(_OURS) for name in file.keys())  # noqa: SIM118, it is no dictionary
    except (OSError, SafetensorError):
        return False  # transformers says what is wrong with it


def _another_table(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: {QUANTIZATION} that has changed since it was written", "the table as it was written", _DO
    )


def _is_as_written(path: Path) -> bool:
    """Return whether a weight file has checksums, after comparing them."""
    try:
        with safe_open(path, framework="pt"):
            pass
        changed = checksums.changed_tensors(path, part=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}", "a whole safetensors file", _DO) from error
    if changed:
        raise CheckpointError(
            f"{path}: content that has changed since it was written: {checksums.listed(changed)}",
            "a file as it was written",
            f"{_DO}; to keep a change of your own, save the tensors without the metadata {checksums.KEY!r}",
        )
    return changed is not None


def _missing(paths: Sequence[Path]) -> str:
    """Return in words which tensors are in a table of checksums, and in no file."""
    files = [checksums.stored_checksums(path) for path in paths]
    missing = {name for file in files for name in file.table}.difference(*(file.names for file in files))
    return f" (missing: {checksums.listed(sorted(missing))})" if missing else ""


def _config_beside(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # transformers says what is wrong with it
    return content if isinstance(content, dict) else {}


def _check_config(weights: Path, config: Mapping[str, Any]) -> None:
    """Compare config.json with what a weight file says of it."""
    stored = checksums.stored_checksums(weights).strings.get(_FIELDS)
    if stored is None:
        return
    fields = json.loads(stored)
    current = {**config, QUANTIZATION: _without_hash(config[QUANTIZATION])}
    changed = sorted(
        key
        for key in {*fields, *current} - {*_UNIMPORTANT}
        if key not in current or fields.get(key) != checksums.text_checksum(current[key])
    )
    path = weights.parent / CONFIG
    if QUANTIZATION in changed:
        raise _another_table(path)
    if changed:
        warnings.warn(
            f"{path} has changed since the model was compressed: {checksums.listed(changed)}", stacklevel=3
        )


def _without_hash(quantization: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in quantization.items() if key != HASH}
