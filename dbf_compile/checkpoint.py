"""The disk format of factors: one safetensors file, layers by name. No other module reads or writes it.

    tensor    "<layer>.<name>", name one of signs_in, signs_out, scale_in, scale_mid, scale_out
    header    "format": "dbf", "format_version": "1",
              "layers": JSON {layer: {"in_features": K, "mid_features": R, "out_features": N,
                                      "shares_first_stage_with": layer or null}},
              "checksums": of tensors and header, see :mod:`dbf_compile.checksums`; older files have none,
              and the user's own keys

A layer may share its first stage (signs_in, scale_in, scale_mid). It then names the layer that stores the first stage
and stores only signs_out and scale_out. Loading returns shared tensors as the same objects. Nothing is ever unpickled.

Shape letters: K in_features, R mid_features, N out_features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbf_compile import checksums
from dbf_compile.errors import CheckpointError, FactorsError
from dbf_compile.factors import (
    FIRST_STAGE,
    SCALE_DTYPES,
    SIGN_NAMES,
    TENSOR_NAMES,
    DoubleBinaryFactors,
    factor_shapes,
)
from dbf_compile.files import atomic_write

FORMAT, VERSION = "dbf", "1"
RESERVED_KEYS = ("format", "format_version", "layers", checksums.KEY)

# safetensors' names of dtypes
_SIGN_DTYPES = ("I32",)
_SCALE_DTYPES = tuple(
    {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype] for dtype in SCALE_DTYPES
)
_MAKE_AGAIN = "the file is damaged: save the factors again"
_NOT_OURS = "pass a file written by dbf_compile.checkpoint.save"


@dataclass(frozen=True)
class _Layer:
    """The entry of one layer in the header."""

    in_features: int
    mid_features: int
    out_features: int
    shares_first_stage_with: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the five tensors by name."""
        return factor_shapes(self.in_features, self.mid_features, self.out_features)

    def keys(self, name: str) -> dict[str, str]:
        """Return the keys under which the file stores the five tensors of the layer ``name``."""
        first = name if self.shares_first_stage_with is None else self.shares_first_stage_with
        return {tensor: f"{first if tensor in FIRST_STAGE else name}.{tensor}" for tensor in TENSOR_NAMES}


def save(
    factors: Mapping[str, DoubleBinaryFactors],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write factors to a file, atomically: the file is replaced as a whole or not at all.

    Args:
        factors: layer name to factors. Layers that share the tensors of their first stage, such as those that
            ``DoubleBinaryFactors.split`` returns, share them in the file as well.
        path: the file; its folder must exist.
        metadata: more strings for the header, such as the name of the model.

    Raises:
        CheckpointError: ``factors`` is empty, factors are on the meta device, metadata has a reserved key or is no
            string, or the file cannot be written.
    """
    path = Path(path)
    if not factors:
        raise CheckpointError(
            "no factors to save", "one layer or more", "check that the model has layers to factor"
        )
    layers: dict[str, _Layer] = {}
    tensors: dict[str, Tensor] = {}
    owners: dict[object, str] = {}
    for name, layer in factors.items():
        if layer.scale_in.device.type == "meta":
            raise CheckpointError(
                f"factors of {name!r} on the meta device", "factors with content", "load or make them first"
            )
        owner = owners.setdefault(_first_stage_of(layer), name)
        shared = None if owner == name else owner
        layers[name] = _Layer(layer.in_features, layer.mid_features, layer.out_features, shared)
        for tensor, key in layers[name].keys(name).items():
            # Copied, because safetensors refuses views and tensors that occur twice.
            if key not in tensors:
                tensors[key] = layer.tensors()[tensor].detach().to("cpu", copy=True).contiguous()
    write_tensors(tensors, _header(layers, metadata or {}), path)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, DoubleBinaryFactors]:
    """Read factors from a file; the whole file is checked before anything is returned.

    Args:
        path: a file written by :func:`save`.
        device: where to put the tensors.

    Returns:
        Layer name to factors, in the order of saving. Layers that share a first stage hold the same tensor objects.

    Raises:
        CheckpointError: the file does not exist, has another format or version, or is damaged.
    """
    with _opened(path) as file:
        layers = _read_layers(_read_header(file))
        # Each tensor is read once: layers that share a key get the same object.
        tensors = {key: _read_tensor(file, key).to(device) for key in _checked_keys(file, layers)}
        factors = {name: _factors_of(name, layer, tensors) for name, layer in layers.items()}
        _check_content(path)
        return factors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the ``metadata`` that :func:`save` wrote, without reading a tensor.

    Raises:
        CheckpointError: the file does not exist, or has another format or version.
    """
    with _opened(path) as file:
        return {key: value for key, value in _read_header(file).items() if key not in RESERVED_KEYS}


def _first_stage_of(factors: DoubleBinaryFactors) -> object:
    """Return a key that is equal for factors whose first stages share memory."""
    tensors = (getattr(factors, name) for name in FIRST_STAGE)
    return tuple((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


def _header(layers: Mapping[str, _Layer], metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if key in RESERVED_KEYS:
            raise CheckpointError(
                f"metadata under the reserved key {key!r}",
                f"any key but {', '.join(RESERVED_KEYS)}",
                "rename it",
            )
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(
                f"metadata {key!r}: {value!r}", "strings", "convert it, for instance to JSON"
            )
    table = json.dumps({name: asdict(layer) for name, layer in layers.items()})
    return {"format": FORMAT, "format_version": VERSION, "layers": table, **metadata}


def write_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> None:
    """Write a safetensors file with checksums, atomically: the file is replaced as a whole or not at all.

    Args:
        tensors: on the CPU, contiguous, none a view of another.
        header: string metadata.
        path: the file; its folder must exist.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with atomic_write(path) as partial:
            save_file(dict(tensors), partial, checksums.with_checksums(tensors, header))
            checksums.sort_header(partial)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing {path} failed ({error})",
            "a path in an existing, writable folder with room for it",
            "make room, or choose another path",
        ) from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the open file; a CheckpointError raised inside gets the path in front of its message."""
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(
                "a folder" if path.is_dir() else "no such file", "a checkpoint file", _NOT_OURS
            )
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except OSError as error:
            raise CheckpointError(
                f"a file that cannot be opened ({error})", "a file that can be read", "check who may read it"
            ) from error
        except SafetensorError as error:
            if _looks_like_safetensors(path):
                raise CheckpointError(
                    f"a safetensors file that is cut short or damaged ({error})", "a whole file", _MAKE_AGAIN
                ) from error
            raise CheckpointError(
                f"no safetensors file ({error})", "a safetensors file", _NOT_OURS
            ) from error
    except CheckpointError as error:
        raise error.inside(str(path)) from error.__cause__


def _looks_like_safetensors(path: Path) -> bool:
    # A safetensors file starts with eight bytes for the length of its header, a JSON object.
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _read_header(file: Any) -> dict[str, str]:
    header: dict[str, str] = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"a safetensors file of another kind (format={header.get('format')!r})",
            f"format={FORMAT!r}",
            _NOT_OURS,
        )
    if header.get("format_version") != VERSION:
        raise CheckpointError(
            f"format_version={header.get('format_version')!r}",
            f"format_version={VERSION!r}",
            "update dbf_compile",
        )
    return header


def _read_layers(header: Mapping[str, str]) -> dict[str, _Layer]:
    try:
        table = json.loads(header["layers"])
        layers = {name: _Layer(**entry) for name, entry in table.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"an unreadable list of layers ({type(error).__name__}: {error})",
            "the JSON that save wrote",
            _MAKE_AGAIN,
        ) from error
    if not layers:
        raise CheckpointError("an empty list of layers", "one layer or more", _MAKE_AGAIN)
    for name, layer in layers.items():
        for field, size in asdict(layer).items():
            if field != "shares_first_stage_with" and (type(size) is not int or size < 1):
                raise CheckpointError(
                    f"layer {name!r} with {field}={size!r}", "a positive number", _MAKE_AGAIN
                )
        _check_shared(name, layer, layers)
    return layers


def _check_shared(name: str, layer: _Layer, layers: Mapping[str, _Layer]) -> None:
    shared = layer.shares_first_stage_with
    if shared is None:
        return
    if not isinstance(shared, str) or shared not in layers:
        raise CheckpointError(
            f"layer {name!r} shares its first stage with {shared!r}, which is not in the file",
            "a layer of the same file",
            _MAKE_AGAIN,
        )
    owner = layers[shared]
    # The owner must store its first stage itself: this rules out chains, and with them cycles.
    if owner.shares_first_stage_with is not None:
        raise CheckpointError(
            f"layer {name!r} shares its first stage with {shared!r}, which does not store one",
            "a layer that stores its first stage",
            _MAKE_AGAIN,
        )
    if (layer.in_features, layer.mid_features) != (owner.in_features, owner.mid_features):
        raise CheckpointError(
            f"layer {name!r} with in_features={layer.in_features}, mid_features={layer.mid_features} "
            f"shares its first stage with {shared!r}",
            f"in_features={owner.in_features}, mid_features={owner.mid_features}",
            _MAKE_AGAIN,
        )


def _checked_keys(file: Any, layers: Mapping[str, _Layer]) -> set[str]:
    """Return the keys of all tensors, after checking names, dtypes and shapes against the table of layers."""
    stored = set(file.keys())
    for name, layer in layers.items():
        shapes = layer.shapes()
        for tensor, key in layer.keys(name).items():
            if key not in stored:
                raise CheckpointError(f"no tensor {key!r}", f"all tensors of layer {name!r}", _MAKE_AGAIN)
            entry = file.get_slice(key)
            dtypes = _SIGN_DTYPES if tensor in SIGN_NAMES else _SCALE_DTYPES
            if entry.get_dtype() not in dtypes:
                raise CheckpointError(
                    f"{key!r} of dtype {entry.get_dtype()}", " or ".join(dtypes), _MAKE_AGAIN
                )
            if tuple(entry.get_shape()) != shapes[tensor]:
                raise CheckpointError(
                    f"{key!r} of shape {tuple(entry.get_shape())}", str(shapes[tensor]), _MAKE_AGAIN
                )
    extra = stored - {key for name, layer in layers.items() for key in layer.keys(name).values()}
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensors that belong to no layer, such as {min(extra)!r}",
            "tensors of its layers",
            _MAKE_AGAIN,
        )
    return stored


def _read_tensor(file: Any, key: str) -> Tensor:
    tensor: Tensor = file.get_tensor(key)
    # Tensors are views of the memory-mapped file. Layers on the CPU copy signs into another order; a scale that is not
    # copied as well would keep the whole file mapped.
    return tensor.clone() if tensor.is_floating_point() else tensor


def _check_content(path: str | os.PathLike[str]) -> None:
    """Refuse what is valid, but not what was written."""
    changed = checksums.changed_tensors(path)
    if changed:
        raise CheckpointError(
            f"content that has changed since it was written: {checksums.listed(changed)}",
            "a file as it was written",
            "copy it again from where it was written, or save the factors again",
        )


def _factors_of(name: str, layer: _Layer, tensors: Mapping[str, Tensor]) -> DoubleBinaryFactors:
    try:
        return DoubleBinaryFactors(**{tensor: tensors[key] for tensor, key in layer.keys(name).items()})
    except FactorsError as error:
        raise CheckpointError(f"layer {name!r}: {error.got}", error.allowed, _MAKE_AGAIN) from error
