"""The disk format of importances: one safetensors file, layers by name.

tensor    "<layer>.<moment>", moment one of input_second_moment, output_grad_second_moment, where it is not None
header    "format": "dbf_importance", "layers": JSON list of the names of all layers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbf_compile.checkpoint import write_tensors
from dbf_compile.errors import CheckpointError
from dbf_compile.factorizer.importance import Importance

_FORMAT = "dbf_importance"


def save_importance(importance: Mapping[str, Importance], path: str | Path) -> None:
    """Write importances to a file, atomically: the file is replaced as a whole or not at all.

    Args:
        importance: layer name to importance, as ``calibrate`` returns.
        path: the file; its folder must exist.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {
        f"{name}.{kind}": moment.detach().to("cpu", copy=True).contiguous()
        for name, item in importance.items()
        for kind, moment in item.moments().items()
        if moment is not None
    }
    write_tensors(tensors, {"format": _FORMAT, "layers": json.dumps(list(importance))}, Path(path))


def load_importance(path: str | Path) -> dict[str, Importance]:
    """Read a file written by :func:`save_importance`.

    Returns:
        Layer name to importance, on the CPU, in the order of saving.

    Raises:
        CheckpointError: the file does not exist, has another format, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise CheckpointError(
                    f"{path} of format {header.get('format')!r}",
                    _FORMAT,
                    "pass a file written by save_importance",
                )
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return {
            name: Importance(*(tensors.get(f"{name}.{kind}") for kind in Importance().moments()))
            for name in json.loads(header["layers"])
        }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}, which cannot be read as importances ({error})",
            "a whole file written by save_importance",
            "calibrate again",
        ) from error
