"""The durable cache of factors: made once per content, found again by any process.

A key covers everything the factors depend on: the bytes of the weight, its importance, the middle dimension,
the factorizer's settings and its source. A hit can therefore never be stale.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from torch import Tensor

from dbf_compile import checkpoint
from dbf_compile.errors import CheckpointError
from dbf_compile.factorizer.factorize import FactorizerConfig
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.files import cache_folder
from dbf_compile.hashes import source_hash, tensor_hash

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
    digest = hashlib.sha256(source_hash("dbf_compile.factorizer").encode())
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
