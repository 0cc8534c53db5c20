"""The disk format: factors by layer name in one safetensors file; nobody else reads or writes it.

    tensor    "<layer>.<name>", name one of signs_in, signs_out, scale_in, scale_mid, scale_out
    header    "format": "dbf", "format_version": "1",
              "layers": JSON {layer: {"in_features": K, "mid_features": R, "out_features": N,
                                      "shares_first_stage_with": layer or null}},
              and whatever other keys the user gave

A layer that shares its first stage (signs_in, scale_in, scale_mid) names the layer that stores it and stores only
signs_out and scale_out itself; the shared tensors come back as the same objects. Nothing is ever unpickled.
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

from dbf_compile.errors import CheckpointError, FactorsError
from dbf_compile.factors import FIRST_STAGE, SCALE_DTYPES, TENSOR_NAMES, DoubleBinaryFactors
from dbf_compile.files import appearing
from dbf_compile.signs import words_per_row

FORMAT, VERSION = "dbf", "1"
RESERVED_KEYS = ("format", "format_version", "layers")

_DTYPE_NAMES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_SCALE_DTYPES = tuple(_DTYPE_NAMES[dtype] for dtype in SCALE_DTYPES)
_MAKE_AGAIN = "the file is damaged: save the factors again"
_NOT_OURS = "pass a file written by dbf_compile.checkpoint.save"


@dataclass(frozen=True)
class _Layer:
    in_features: int
    mid_features: int
    out_features: int
    shares_first_stage_with: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, r, n = self.in_features, self.mid_features, self.out_features
        return {
            "signs_in": (r, words_per_row(k)),
            "signs_out": (n, words_per_row(r)),
            "scale_in": (k,),
            "scale_mid": (r,),
            "scale_out": (n,),
        }

    def keys(self, name: str) -> dict[str, str]:
        """Return where the five tensors of the layer ``name`` are stored."""
        first = name if self.shares_first_stage_with is None else self.shares_first_stage_with
        return {tensor: f"{first if tensor in FIRST_STAGE else name}.{tensor}" for tensor in TENSOR_NAMES}


def save(
    factors: Mapping[str, DoubleBinaryFactors],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write factors to a file, which appears whole or not at all and replaces what was there.

    Args:
        factors: layer name to factors; layers that share the tensors of their first stage, as those of
            ``DoubleBinaryFactors.split`` do, share them in the file as well.
        path: the file; its folder exists.
        metadata: further strings for the header, such as the name of the model.

    Raises:
        CheckpointError: nothing to save, factors without content (meta device), metadata under a reserved key
            or not of strings, or the file cannot be written.
    """
    path = Path(path)
    if not factors:
        raise CheckpointError(
            "no factors to save", "one layer or more", "check that the model has layers to factor"
        )
    layers: dict[str, _Layer] = {}
    tensors: dict[str, Tensor] = {}
    owners: dict[object, str] = {}
    for name, made in factors.items():
        if made.scale_in.device.type == "meta":
            raise CheckpointError(
                f"factors of {name!r} on the meta device", "factors with content", "load or make them first"
            )
        owner = owners.setdefault(_first_stage_of(made), name)
        shared = None if owner == name else owner
        layers[name] = _Layer(made.in_features, made.mid_features, made.out_features, shared)
        for tensor, key in layers[name].keys(name).items():
            # A copy: safetensors refuses views, and tensors that occur twice.
            if key not in tensors:
                tensors[key] = made.tensors()[tensor].detach().to("cpu", copy=True).contiguous()
    write_tensors(tensors, _header(layers, metadata or {}), path)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, DoubleBinaryFactors]:
    """Read factors from a file and check all of it before anything is returned.

    Args:
        path: a file written by :func:`save`.
        device: where the tensors go.

    Returns:
        Layer name to factors, in the order of saving; a shared first stage is one set of tensors.

    Raises:
        CheckpointError: no such file, not of this format or of a newer version, or damaged in any way.
    """
    with _opened(path) as file:
        layers = _read_layers(_read_header(file))
        # Every tensor once: layers that name the same key get the same object.
        tensors = {key: _read_tensor(file, key).to(device) for key in _checked_keys(file, layers)}
        return {name: _make(name, layer, tensors) for name, layer in layers.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings given to :func:`save` as ``metadata``; no tensor is read.

    Raises:
        CheckpointError: no such file, or not of this format.
    """
    with _opened(path) as file:
        return {key: value for key, value in _read_header(file).items() if key not in RESERVED_KEYS}


def _first_stage_of(factors: DoubleBinaryFactors) -> object:
    """Return a value that is equal for factors that share the memory of their first stage."""
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
    described = json.dumps({name: asdict(layer) for name, layer in layers.items()})
    return {"format": FORMAT, "format_version": VERSION, "layers": described, **metadata}


def write_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> None:
    """Write a safetensors file, which appears whole or not at all and replaces what was there.

    Args:
        tensors: on the CPU, contiguous, none a view of another.
        header: strings.
        path: the file; its folder exists.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with appearing(path) as partial:
            save_file(dict(tensors), partial, dict(header))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing {path} failed ({error})",
            "a path in an existing, writable folder with room for it",
            "make room, or choose another path",
        ) from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the open file; every CheckpointError raised inside gets the path in front."""
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(
                "a folder" if path.is_dir() else "no such file", "a checkpoint file", _NOT_OURS
            )
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
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
    # Eight bytes give the length of the header, which is a JSON object.
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
        described = json.loads(header["layers"])
        layers = {name: _Layer(**entry) for name, entry in described.items()}
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
    # One step only: chains are never written, and without them no cycle can arise.
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
    """Return the keys of all tensors, after comparing names, dtypes and shapes with what the layers need."""
    found = set(file.keys())
    for name, layer in layers.items():
        shapes = layer.shapes()
        for tensor, key in layer.keys(name).items():
            if key not in found:
                raise CheckpointError(f"no tensor {key!r}", f"all tensors of layer {name!r}", _MAKE_AGAIN)
            entry = file.get_slice(key)
            dtypes = ("I32",) if tensor.startswith("signs") else _SCALE_DTYPES
            if entry.get_dtype() not in dtypes:
                raise CheckpointError(
                    f"{key!r} of dtype {entry.get_dtype()}", " or ".join(dtypes), _MAKE_AGAIN
                )
            if tuple(entry.get_shape()) != shapes[tensor]:
                raise CheckpointError(
                    f"{key!r} of shape {tuple(entry.get_shape())}", str(shapes[tensor]), _MAKE_AGAIN
                )
    extra = found - {key for name, layer in layers.items() for key in layer.keys(name).values()}
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensors that belong to no layer, such as {min(extra)!r}",
            "tensors of its layers",
            _MAKE_AGAIN,
        )
    return found


def _read_tensor(file: Any, key: str) -> Tensor:
    tensor: Tensor = file.get_tensor(key)
    # Tensors are the mapped file itself. Layers on the CPU copy signs into another order; a scale that is not copied as
    # well would keep all of the file in memory beside them.
    return tensor.clone() if tensor.is_floating_point() else tensor


def _make(name: str, layer: _Layer, tensors: Mapping[str, Tensor]) -> DoubleBinaryFactors:
    try:
        return DoubleBinaryFactors(**{tensor: tensors[key] for tensor, key in layer.keys(name).items()})
    except FactorsError as error:
        raise CheckpointError(f"layer {name!r}: {error.got}", error.allowed, _MAKE_AGAIN) from error
