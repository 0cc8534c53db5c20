"""Hashes of contents: tensors, batches, models, and the source code of packages."""

from __future__ import annotations

import ctypes
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
    """Return the SHA-256 of a tensor's dtype, shape and content, whatever its device and strides.

    Nothing about the tensor changes. A NumPy array of it, for one, would forbid its storage to be resized from then on.

    Args:
        tensor: of any dtype and layout; of a subclass made of others, such as DTensor, these are hashed.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for part in _dense_parts(tensor.detach()):
        content = part.cpu().resolve_conj().resolve_neg().contiguous()
        size = content.numel() * content.element_size()
        if size:
            digest.update((ctypes.c_char * size).from_address(content.data_ptr()))
    return digest.digest()


def _dense_parts(tensor: Any) -> list[Tensor]:
    """Return strided tensors of bytes that hold the content."""
    if hasattr(tensor, "__tensor_flatten__"):  # torch's protocol of subclasses that are made of other tensors
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _dense_parts(getattr(tensor, name).detach())]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


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
