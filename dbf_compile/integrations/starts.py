"""Starts: what generating text with a folder takes, kept so that the next process opens no model and imports no model's code.

    a file of the cache    of every tensor that programs read: its name in the folder's files, or itself where it is in none;
                           settings of generation, limits, and the class of the tokenizer

Importing the code of models takes transformers longer than all else that a start does. A start is of the files as they lie in the
folder, not of copies of them, and of this package, torch, transformers and processor. It is kept of models that are as they were
opened; whatever differs, the model is opened as ever.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbf_compile.checksums import changed_tensors, with_checksums
from dbf_compile.files import atomic_write, cache_folder
from dbf_compile.hashes import source_hash
from dbf_compile.huge_pages import in_huge_pages
from dbf_compile.machine import instructions

Sizes = list[tuple[int, int, int, torch.dtype]]  # see ``attention_ops.empty_cache``

_START = "start"
_MOST = 2**24  # bytes of tensors that are in no file, such as the frequencies of rotary embeddings
_OWN_CODE = "transformers."  # of tokenizers; others may need to be trusted
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class StoredModel:
    """Stands for a model that is not opened.

    Args:
        name: of the model's class.
        tensors: by the paths that programs know them by.
        sizes: of the cache, by layer.
        fingerprint: in the names of the programs.
        dtype: of the model.
        limits: of its prompts, as JSON has them.
        weight_bytes: of its parameters and buffers.
        generation_config: its settings.
    """

    name: str
    tensors: Mapping[str, Tensor]
    sizes: Sizes
    fingerprint: str
    dtype: torch.dtype
    limits: Mapping[str, Any]
    weight_bytes: int
    generation_config: Any

    @property
    def device(self) -> torch.device:
        """The CPU: only what computes there is kept."""
        return torch.device("cpu")

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by path."""
        yield from self.tensors.items()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: all tensors are parameters here."""
        yield from ()


def load(folder: Path) -> StoredModel | None:
    """Return what was kept of a folder, or None: nothing, or something changed."""
    try:
        file = file_of(folder)
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()[_START])
            tensors = {path: opened.get_tensor(path) for path in opened.keys()}  # noqa: SIM118  not a mapping
        if changed_tensors(file) != []:
            return None
        for name, places in facts["files"].items():
            with safe_open(folder / name, "pt") as opened:
                tensors |= {path: opened.get_tensor(tensor) for path, tensor in places.items()}
        return StoredModel(
            facts["name"],
            in_huge_pages(tensors),
            [(*size[:3], getattr(torch, size[3])) for size in facts["sizes"]],
            facts["fingerprint"],
            getattr(torch, facts["dtype"]),
            facts["limits"],
            facts["weight_bytes"],
            transformers.GenerationConfig.from_dict(facts["generation"]),
        )
    except _UNREADABLE:
        return None


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of a folder of which a start was kept, or None."""
    try:
        with safe_open(file_of(folder), "pt") as opened:
            name = json.loads(opened.metadata()[_START])["tokenizer"]
        return None if name is None else _tokenizer(folder, name)
    except _UNREADABLE:
        return None


class OpenedModel:
    """A model and the folder that it has been opened from.

    Args:
        folder: of the model.
        file: where its start is to be kept, by the folder's files before it was opened.
        model: as it was opened.
        limits: of its prompts, as JSON can hold them.
    """

    def __init__(self, folder: Path, file: Path, model: Any, limits: Mapping[str, Any]) -> None:
        self._folder, self._file, self._model = folder, file, model
        self._state = _state_of(model)
        # Before anybody changes them.
        self._facts = {
            "name": type(model).__name__,
            "dtype": _dtype_name(model.dtype),
            "limits": dict(limits),
            "generation": model.generation_config.to_dict(),
        }

    def keep(
        self, tensors: Mapping[str, Tensor], sizes: Sizes, fingerprint: str, weight_bytes: int, tokenizer: Any
    ) -> None:
        """Keep what the next start takes, where the model is as it was opened and the cache can be written.

        Args:
            tensors: that programs read, by their paths.
            sizes, fingerprint, weight_bytes: as for :class:`StoredModel`.
            tokenizer: that was opened beside it.
        """
        if _state_of(self._model) != self._state:
            return
        # What cannot be kept, or is not read again as it was, is opened as ever next time.
        with suppress(*_UNREADABLE):
            places = self._places(tensors)
            kept = {path for paths in places.values() for path in paths}
            others = {path: tensor for path, tensor in tensors.items() if path not in kept}
            # Programs read tensors as they lay in memory, and safetensors holds contiguous ones alone.
            if not all(tensor.is_contiguous() for tensor in others.values()):
                return
            # Before all files are read.
            if sum(tensor.nbytes for tensor in others.values()) > _MOST or not self._hold(places, tensors):
                return
            facts = {
                **self._facts,
                "files": places,
                "sizes": [(*size[:3], _dtype_name(size[3])) for size in sizes],
                "fingerprint": fingerprint,
                "weight_bytes": weight_bytes,
                "tokenizer": _class_of(self._folder, tokenizer),
            }
            self._file.parent.mkdir(parents=True, exist_ok=True)
            others = {path: tensor.detach().clone() for path, tensor in others.items()}
            with atomic_write(self._file) as partial:
                save_file(others, partial, with_checksums(others, {_START: json.dumps(facts)}))

    def _places(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
        """Return for every file of the folder which tensors of programs it holds, by path and name."""
        names: dict[int, list[str]] = {}
        for name, tensor in _tensors_of(self._model):
            names.setdefault(id(tensor), []).append(name)
        left = {path: names.get(id(tensor), []) for path, tensor in tensors.items()}
        places: dict[str, dict[str, str]] = {}
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                stored = set(opened.keys())
                for path in list(left):
                    held = [name for name in left[path] if name in stored]
                    if not held:
                        continue
                    places.setdefault(file.name, {})[path] = held[0]
                    del left[path]
        return places

    def _hold(self, places: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> bool:
        """Return whether files hold the content, too: a model may have made it of several tensors, or cast it."""
        for file, names in places.items():
            with safe_open(self._folder / file, "pt") as opened:
                if not all(_is_same(tensors[path], opened.get_tensor(name)) for path, name in names.items()):
                    return False
        return True


def file_of(folder: Path) -> Path:
    """Return where the start of a folder is kept; the name depends on all that it does.

    Raises:
        OSError: the folder cannot be read.
    """
    files = [
        (path.name, (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        for path in sorted(folder.iterdir())
    ]
    versions = (transformers.__version__, torch.__version__, torch.version.git_version)
    machine = (instructions(), torch.get_num_threads())
    parts = (str(folder.resolve()), files, source_hash("dbf_compile"), versions, machine)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return cache_folder() / "starts" / f"{digest}.safetensors"


def _tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _state_of(model: Any) -> list[Any]:
    """Return what changes when a model does: its modules, and where its tensors lie and how often they were written to."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    tensors = [
        (name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for name, tensor in _tensors_of(model)
    ]
    return [modules, tensors, model.config.to_json_string(use_diff=False)]


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    alike = (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride())
    # Of bytes: NaN equals itself then.
    return alike and torch.equal(*(each.detach().flatten().view(torch.uint8) for each in (tensor, other)))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _class_of(folder: Path, tokenizer: Any) -> str | None:
    """Return "module:class" of a tokenizer that its class opens from the folder as it is, or None."""
    kind = type(tokenizer)
    if not kind.__module__.startswith(_OWN_CODE):
        return None
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        twin = _tokenizer(folder, name)
    except Exception:  # tokenizers raises no other kind
        return None
    return name if _content_of(twin) == _content_of(tokenizer) else None


def _tokenizer(folder: Path, name: str) -> Any:
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(module), kind).from_pretrained(folder)


def _content_of(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        None if backend is None else backend.to_str(),
        tokenizer.get_vocab(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    )
