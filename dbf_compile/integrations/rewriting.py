"""A compressed folder with other content in some of its tensors: same files, names, shapes, dtypes and bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dbf_compile import checksums
from dbf_compile.checkpoint import write_tensors
from dbf_compile.errors import CheckpointError
from dbf_compile.files import write_text
from dbf_compile.integrations.content import CONFIG, HASH, QUANTIZATION, content_hash
from dbf_compile.integrations.renaming import in_files


def rewrite_model(source: Path, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write a compressed folder anew, with other content for some tensors.

    Args:
        source: the folder as it is.
        folder: where to, an empty folder.
        model: that of ``source``; it knows how files name its tensors.
        tensors: new content by the names that the model has; a tensor that others share is stored by one of its names.

    Raises:
        CheckpointError: the files do not store one of them, or a file cannot be written.
    """
    check_stores(source, model, tensors)
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    rename = in_files(model)
    new = {rename(name): tensor for name, tensor in tensors.items()}
    files = _files(source)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        _rewrite_file(source / file, folder / file, new)
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if HASH in content.get(QUANTIZATION, {}):
        content[QUANTIZATION][HASH] = content_hash(folder / file for file in files if len(file.parts) == 1)
        write_text(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")


def check_stores(source: Path, model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a folder that could not be written anew with other content for some tensors.

    Args:
        source, model: as for :func:`rewrite_model`.
        names: of the tensors.

    Raises:
        CheckpointError: the files do not store one of them, or cannot be read.
    """
    stored: set[str] = set()
    for path in _files(source):
        try:
            with safe_open(source / path, framework="pt") as file:
                stored |= set(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{source / path}, which cannot be read ({error})",
                "a whole file",
                "take it out of the folder",
            ) from error
    rename = in_files(model)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    owners = {rename(name): rename(owner) for name, owner in ties.items()}
    new = map(rename, names)
    missing = sorted(name for name in new if name not in stored and owners.get(name) not in stored)
    if missing:
        raise CheckpointError(
            f"{source} without {checksums.listed(missing)}",
            "a folder that stores every tensor that is trained",
            "save the model again with save_pretrained, and start from that folder",
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))


def _rewrite_file(source: Path, path: Path, new: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        header = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118, it is no mapping
            old = file.get_tensor(name)
            tensors[name] = old if name not in new else new[name].detach().to("cpu", old.dtype).contiguous()
            if tensors[name].shape != old.shape:
                raise CheckpointError(
                    f"{name!r} of shape {tuple(tensors[name].shape)} for {source}",
                    f"{tuple(old.shape)}, as it is stored",
                    "start from the folder that the model was loaded from",
                )
    header.pop(checksums.KEY, None)
    write_tensors(tensors, header, path)
