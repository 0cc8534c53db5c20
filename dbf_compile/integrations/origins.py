"""Where a model comes from: a folder, a GGUF file, or the Hub; in the end a folder of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from dbf_compile.checksums import listed
from dbf_compile.errors import ConversionError, DBFError, first_line
from dbf_compile.files import user_path
from dbf_compile.integrations.companions import OTHER_FORMS
from dbf_compile.integrations.gguf_header import SOURCE

_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_GGUF = ".gguf"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[^:]+)?(:.+)?", re.ASCII)


def local_folder(path: str | Path) -> Path:
    """Return the folder of a model.

    Weights are those of safetensors; where there are none, PyTorch's own; where there are neither, those of a GGUF file, which is
    dequantized into a folder of the cache.

    Args:
        path: a folder, a GGUF file, or a name on the Hub: "name", "name@revision", and "name:file.gguf" for one file of it.

    Raises:
        ConversionError: there is no model, or there are several GGUF files.
        CheckpointError: a GGUF file is damaged.
    """
    place = user_path(path)
    if place.is_dir():
        return _folder_or_gguf(place)
    if place.exists():
        return _dequantized(place)
    if place.is_symlink():
        raise _unknown(path, f"a link to {place.readlink()}, where nothing is")
    if not _HUB_NAME.fullmatch(str(path)):
        raise _unknown(path, "no such file or folder")
    try:
        return _downloaded(str(path))
    except (OSError, ValueError) as error:  # no such name, no network, no permission
        if isinstance(error, DBFError):
            raise
        reason = first_line(error)
        raise _unknown(path, f"no folder here, and the Hub does not give it: {reason}") from error


def _unknown(path: str | Path, reason: str) -> ConversionError:
    return ConversionError(
        f"no model {str(path)!r} ({reason})",
        "the folder of a pretrained model, a GGUF file, or a name on the Hub such as 'Qwen/Qwen3-0.6B'",
        "check the path",
    )


def _folder_or_gguf(folder: Path) -> Path:
    files = sorted(folder.glob(f"*{_GGUF}"))
    others = any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))
    return (
        folder if not files or others else _dequantized(folder / _only([file.name for file in files], folder))
    )


def _downloaded(path: str) -> Path:
    source, _, file = path.partition(":")
    name, _, revision = source.partition("@")
    if file:
        return _dequantized(Path(hf_hub_download(name, file, revision=revision or None)))
    folder = Path(snapshot_download(name, revision=revision or None, ignore_patterns=list(OTHER_FORMS)))
    if any(folder.glob("*.safetensors")):
        return folder
    snapshot_download(name, revision=revision or None, allow_patterns=list(_PICKLED))
    if any(folder.glob("*.bin")):
        return folder
    files = [one for one in HfApi().list_repo_files(name, revision=revision or None) if one.endswith(_GGUF)]
    if not files:
        return folder
    return _dequantized(Path(hf_hub_download(name, _only(files, name), revision=revision or None)))


def _only(files: Sequence[str], place: str | Path) -> str:
    if len(files) > 1:
        joint = "/" if isinstance(place, Path) else ":"
        raise ConversionError(
            f"{place} with {len(files)} GGUF files ({listed(files)})",
            "one model",
            f"name one: {place}{joint}{files[0]}",
        )
    return files[0]


def _dequantized(file: Path) -> Path:
    from dbf_compile.integrations import gguf

    return gguf.dense_folder(file)


def file_type(folder: Path | None) -> str | None:
    """Return the type and bits of the quantized file that a folder of the cache was dequantized from, or None."""
    source = None if folder is None else folder.parent / SOURCE
    if source is None or not source.is_file():
        return None
    facts = json.loads(source.read_text(encoding="utf-8"))
    return f"GGUF {facts['type']}, {facts['bits']:.2f} bits per weight"
