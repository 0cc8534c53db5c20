"""The files of a model besides its weights and its config.json: tokenizers, processors, code, chat templates, modules, licence.

They are known by what they are not. What holds weights is another form of the model, or a state of its training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dbf_compile.integrations.content import CONFIG

CODE = ("configuration_dbf.py", "modeling_dbf.py")  # ours
_OURS = ("dbf_report.json", "dbf_report.html", *CODE)
_WEIGHTS = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".ot",
    ".tflite",
    ".mlmodel",
    ".distcp",
    ".engine",
    ".nemo",
]
_OF_TRAINING = ("trainer_state.json", "training_args.json", "optimizer.json")
_MODULES = "modules.json"  # of sentence-transformers: the folders that its modules lie in

# What is not downloaded: other forms of the same weights.
OTHER_FORMS = (
    *(f"*{suffix}" for suffix in _WEIGHTS if suffix != ".safetensors"),
    *(f"{folder}/*" for folder in ("original", "onnx", "openvino", "coreml", "checkpoint-*", "runs")),
    "consolidated*",
)

_log = logging.getLogger(__name__)


def companions(source: Path) -> list[Path]:
    """Return the paths, inside the folder of a model, of the files that belong to it besides weights and config.json."""
    modules = _module_folders(source)
    paths = []
    for entry in sorted(source.iterdir()):
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            files = list(_files_in(entry))
            if entry.name in modules or not any(_holds_weights(path.name) for path in files):
                paths += files
            else:
                _log.info("%s holds weights of its own, and is no part of the compressed model", entry)
        elif _belongs(entry.name):
            paths.append(entry)
    return [path.relative_to(source) for path in paths if path.is_file()]


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to the model in ``source``; links are followed."""
    for path in companions(source):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)


def _belongs(name: str) -> bool:
    is_named = name == CONFIG or name in _OURS or name in _OF_TRAINING
    return not (is_named or name.endswith(".index.json") or "tfevents" in name or _holds_weights(name))


def _holds_weights(name: str) -> bool:
    return name.endswith(tuple(_WEIGHTS))


def _files_in(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):  # follows no links of folders: they may lead in circles
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (
            Path(place, name) for name in sorted(names) if not name.startswith(".") and "tfevents" not in name
        )


def _module_folders(source: Path) -> set[str]:
    """Return the folders that belong to a model of sentence-transformers, weights included."""
    try:
        modules = json.loads((source / _MODULES).read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
