"""Programs: functions compiled ahead of time, kept on disk, and called without guards and without Python.

``torch.compile`` asks at every call whether a program still fits, gathers a model's parameters by name, and traces anew in
every process. A program that is only ever called by one caller, who knows its shapes, needs neither: its inputs are looked up
once, and a later process loads it whole. :mod:`dbf_compile.compiler.ahead_of_time` makes them; it needs Dynamo and Inductor,
which take seconds to import, and nothing here does.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._C._aoti import AOTIModelContainerRunnerCpu

from dbf_compile.kernels.cached_attention import cpu_kernel as attention_kernel
from dbf_compile.kernels.row_matmul import cpu_kernel as row_kernel
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.ops import prepare_layers

# A step of a path to an input, as Dynamo writes it: L['model']._modules['norm'], L['keys'][3], .attribute
_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)")

PREPARED = "prepared "  # starts the path of an input that is made of others
_LIBRARY, _DESCRIPTION = "program.so", "inputs.json"
_LIBRARIES = (cpu_kernel.library, attention_kernel.library, row_kernel.library)


class Program:
    """A compiled function of flat inputs.

    Args:
        function: takes a list of tensors, and returns a list.
        paths: where each input stands in the arguments, as in ``L['keys'][3]``. An input of prepared layers has those of
            all tensors that it is made of.
    """

    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]], paths: Sequence[str]) -> None:
        self.function, self.paths = function, list(paths)

    def inputs(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the flat inputs of a call with these arguments; in place of one, its tensors may be there by their paths."""
        return [_input(path, arguments) for path in self.paths]

    def tensors(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return by path the tensors of some arguments that inputs are, or are made of."""
        begins = tuple(f"L['{name}']" for name in arguments)
        paths = (path for whole in self.paths for path in _parts(whole))
        return {path: _at(path, arguments) for path in paths if path.startswith(begins)}

    def places(self, name: str) -> list[int]:
        """Return where in the flat inputs an argument stands that is a tensor."""
        return [index for index, path in enumerate(self.paths) if path == f"L['{name}']"]


def _input(path: str, arguments: Mapping[str, Any]) -> Tensor:
    """Return the input at a path; one of prepared layers is made anew."""
    if not path.startswith(PREPARED):
        tensor: Tensor = _at(path, arguments)
        return tensor
    factors, biases, interleaved = (part.split() for part in path.removeprefix(PREPARED).split("|"))
    tensors, vectors = ([_at(name, arguments) for name in names] for names in (factors, biases))
    return prepare_layers(tensors, vectors, interleaved == ["True"])


def _parts(path: str) -> list[str]:
    """Return the paths of the tensors that an input is made of."""
    if not path.startswith(PREPARED):
        return [path]
    factors, biases, _ = path.removeprefix(PREPARED).split("|")
    return [*factors.split(), *biases.split()]


def _at(path: str, arguments: Mapping[str, Any]) -> Any:
    if path in arguments:
        return arguments[path]
    value: Any = arguments
    for match in _STEP.finditer(path.removeprefix("L")):
        key, index, attribute = match.groups()
        if attribute is not None:
            value = getattr(value, attribute)
        else:
            value = value[key if index is None else int(index)]
    return value


def has_kernels() -> bool:
    """Return whether the kernels are there that programs call."""
    return all(library.available() for library in _LIBRARIES)


def write_program(library: Path, paths: Sequence[str], folder: Path) -> None:
    """Write what :func:`open_program` opens into a folder.

    Args:
        library: compiled, and beside it, where it needs one, a file of its name and ``.json``.
        paths: of its inputs.
        folder: new and empty.
    """
    for part in (library, library.with_suffix(".json")):
        if part.exists():
            shutil.copyfile(part, (folder / _LIBRARY).with_suffix(part.suffix))
    description = {"paths": list(paths), "sha256": _digests(folder)}
    (folder / _DESCRIPTION).write_text(json.dumps(description))


def load_program(folder: Path) -> Program | None:
    """Return the program of a folder, or None if there is none, or it is damaged.

    It is of this torch and this processor: the folder's name is to say both.
    """
    try:
        return open_program(folder) if has_kernels() else None
    except (OSError, RuntimeError, ValueError, KeyError):
        return None


def open_program(folder: Path) -> Program:
    """Return the program of a folder.

    Raises:
        OSError, ValueError, KeyError: it is damaged.
        RuntimeError: the system does not load libraries from there.
    """
    description = json.loads((folder / _DESCRIPTION).read_text())
    if _digests(folder) != description["sha256"]:  # loading half of a library would end the process
        raise ValueError(f"{folder} is damaged")
    return Program(AOTIModelContainerRunnerCpu(str(folder / _LIBRARY), 1).run, description["paths"])


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file but the description itself."""
    files = (file for file in sorted(folder.iterdir()) if file.name != _DESCRIPTION)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
