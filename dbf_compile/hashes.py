"""Hashes of contents: tensors, batches, models, and the source code of packages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SOURCES = (".py", ".cpp", ".h")


def tensor_hash(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's dtype, shape and content, whatever its device and strides."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
    # A contiguous tensor of one entry or none may have strides that a view as bytes refuses.
    flat = content.as_strided((content.numel(),), (1,))
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def batches_hash(batches: Iterable[Any]) -> str:
    """Return the SHA-256 of batches in order, as 64 hexadecimal digits.

    Args:
        batches: tensors, and sequences and mappings of them; anything else counts by its ``repr``.
    """
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
    """Return the SHA-256 of a model's configuration and of all its tensors by name, as 64 hexadecimal digits."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor_hash(tensor))
    return digest.hexdigest()


@cache
def source_hash(*packages: str) -> str:
    """Return the SHA-256 of all source files of packages, subpackages included, as 64 hexadecimal digits.

    Args:
        packages: full names, such as "dbf_compile.factorizer"; packages that are not imported yet stay so.
    """
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations, package
        (root,) = spec.submodule_search_locations
        for folder, _, names in sorted(os.walk(root, followlinks=True)):
            for name in sorted(names):
                if name.endswith(_SOURCES):
                    path = Path(folder, name)
                    digest.update(f"{package} {path.relative_to(root)}".encode())
                    digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
