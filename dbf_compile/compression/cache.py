"""The durable cache of factors: made once per content, found again by any process; and hashes of contents.

A key covers everything the factors depend on: the bytes of the weight, its importance, the middle dimension,
the factorizer's settings and its source. A hit can therefore never be stale.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile import checkpoint
from dbf_compile.compression import admm, projection, refine, turns
from dbf_compile.compression import importance as importance_module
from dbf_compile.compression.admm import FactorizerConfig
from dbf_compile.compression.importance import Importance
from dbf_compile.errors import CheckpointError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.folders import cache_folder

_log = logging.getLogger(__name__)
_LAYER = "layer"


class FactorCache:
    """Factors on disk, one safetensors file per key.

    Args:
        folder: where the files lie; None for ``factors`` in the user's cache folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_folder() / "factors"

    def get(self, key: str) -> DoubleBinaryFactors | None:
        """Return the factors under ``key``, or None; a damaged file counts as absent and is made again."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return checkpoint.load(path)[_LAYER]
        except (CheckpointError, KeyError) as error:
            _log.warning("ignoring a damaged file of the factor cache: %s", error)
            return None

    def put(self, key: str, factors: DoubleBinaryFactors) -> None:
        """Keep ``factors`` under ``key``; the file appears whole or not at all."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save({_LAYER: factors.to("cpu")}, path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def content_key(
    weight: Tensor, mid_features: int, importance: Importance | None, config: FactorizerConfig
) -> str:
    """Return the key of the factors of ``weight``: a hash of all they depend on."""
    digest = hashlib.sha256(_source_hash())
    digest.update(f"{mid_features} {config!r}".encode())
    digest.update(tensor_hash(weight))
    digest.update(importance_hash(importance))
    return digest.hexdigest()


def importance_hash(importance: Importance | None) -> bytes:
    """Return a hash of the two moments; an absent importance and an absent moment have hashes of their own."""
    if importance is None:
        return b"none"
    digest = hashlib.sha256()
    for tensor in (importance.input_second_moment, importance.output_grad_second_moment):
        digest.update(b"none" if tensor is None else tensor_hash(tensor))
    return digest.digest()


def tensor_hash(tensor: Tensor) -> bytes:
    """Return a hash of dtype, shape and content; device and strides do not count."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def batches_hash(batches: Iterable[Any]) -> str:
    """Return a hash of batches: tensors, and sequences and mappings of them."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(tensor_hash(value))
        elif isinstance(value, Mapping):
            for key in sorted(value):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (tuple, list)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for batch in batches:
        add(batch)
    return digest.hexdigest()


def model_hash(model: nn.Module) -> str:
    """Return a hash of a model's configuration and of all its tensors by name."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor_hash(tensor))
    return digest.hexdigest()


@cache
def program_hash() -> str:
    """Return a hash of the source of all that decides on what ``compress`` makes of a model."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in [*sorted(folder.glob("*.py")), folder.parent / "run.py", folder.parent / "experts.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _source_hash() -> bytes:
    digest = hashlib.sha256()
    for module in (admm, importance_module, projection, refine, turns):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.digest()
