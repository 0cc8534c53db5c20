"""The durable cache of factors: made once per content, found again by any process.

A key covers everything the factors depend on: the bytes of the weight, its importance, the middle dimension, the
factorizer's settings and its source. A hit can therefore never be stale.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dbf_compile import checkpoint
from dbf_compile.compression.jobs import FactorJob
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
        self._warned = False

    def get(self, key: str) -> DoubleBinaryFactors | None:
        """Return the factors under ``key``, or None; a file that is damaged or not readable counts as absent."""
        path = self._path(key)
        try:
            return checkpoint.load(path)[_LAYER] if path.exists() else None
        except (CheckpointError, KeyError, OSError) as error:
            self._warn(f"ignoring a file of the factor cache: {error}")
            return None

    def put(self, key: str, factors: DoubleBinaryFactors) -> None:
        """Keep ``factors`` under ``key``; the file appears whole or, with one warning, not at all."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save({_LAYER: factors.to("cpu")}, path)
        except (CheckpointError, OSError) as error:
            self._warn(f"factors are not kept in the cache, other processes will make them again: {error}")

    def _warn(self, message: str) -> None:
        if not self._warned:  # of many layers, the first
            self._warned = True
            _log.warning("%s; choose another folder with cache_dir or DBF_CACHE_DIR", message)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class CachedStore:
    """A store of the factoring engine: results by content, kept in memory and in a :class:`FactorCache`.

    Args:
        cache: where results outlive the process.
        config: the settings of the factorizer that the jobs will run with.
    """

    def __init__(self, cache: FactorCache, config: FactorizerConfig) -> None:
        self._cache, self._config = cache, config
        self._keys: dict[int, tuple[FactorJob, str]] = {}  # hashing reads the whole weight: once per job
        self._factors: dict[str, DoubleBinaryFactors] = {}

    def key(self, job: FactorJob) -> str:
        """Return the hash of all that the factors of a job depend on."""
        entry = self._keys.get(id(job))
        if entry is None:
            key = content_key(job.stacked, job.mid_features, job.importance, self._config)
            entry = self._keys[id(job)] = (job, key)
        return entry[1]

    def has(self, key: str) -> bool:
        """Return whether the factors are in memory or on disk; reads them."""
        if key not in self._factors and (factors := self._cache.get(key)) is not None:
            self._factors[key] = factors
        return key in self._factors

    @contextmanager
    def claim(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Yield the keys without factors. There are no locks: two processes may make the same factors."""
        yield [key for key in keys if key not in self._factors]

    def put(self, key: str, job: FactorJob, factors: DoubleBinaryFactors, seconds: float) -> None:
        """Keep the factors in memory and on disk."""
        self._cache.put(key, factors)
        self._factors[key] = factors

    def get(self, job: FactorJob) -> DoubleBinaryFactors:
        """Return the factors of a job that has run, on the device of its weights."""
        return self._factors[self.key(job)].to(job.weights[0].device)


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
