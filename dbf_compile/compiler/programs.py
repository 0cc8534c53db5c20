"""Programs: functions compiled once, kept on disk, and called without guards.

``torch.compile`` asks at every call whether a program still fits, gathers a model's parameters by name, and traces anew in
every process. A program that is only ever called by one caller, who knows its shapes, needs neither: its inputs are looked up
once, and a later process loads it whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dbf_compile.compiler import dynamo, inductor, lowerings
from dbf_compile.files import atomic_write
from dbf_compile.kernels.cached_attention import cpu_kernel as attention_kernel
from dbf_compile.kernels.row_matmul import cpu_kernel as row_kernel
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.ops import prepare_layers
from dbf_compile.passes.allow_fast_sums import allow_fast_sums
from dbf_compile.passes.graph import example_value
from dbf_compile.passes.pipeline import run_post_grad_pipeline
from dbf_compile.passes.prepare_layers import prepare_layers as prepare_layers_of

# A step of a path to an input, as Dynamo writes it: L['model']._modules['norm'], .size()[1], .attribute
_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)(\(\))?")


_PREPARED = "prepared "
# Programs call their operators by name: they are to be loaded.
_LIBRARIES = (cpu_kernel.available, attention_kernel.library.available, row_kernel.library.available)


class Program:
    """A compiled function of flat inputs.

    Args:
        function: takes the inputs one after the other.
        paths: where each input stands in the arguments, as in ``L['keys'][3].size()[2]``. An input of prepared layers has
            those of all tensors that it is made of.
    """

    def __init__(self, function: Callable[..., Any], paths: Sequence[str]) -> None:
        self.function, self.paths = function, list(paths)

    def inputs(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the flat inputs of a call with these arguments."""
        return [self.value(path, arguments) for path in self.paths]

    def value(self, path: str, arguments: Mapping[str, Any]) -> Any:
        """Return the input at a path; one of prepared layers is made anew."""
        if not path.startswith(_PREPARED):
            return _at(path, arguments)
        factors, biases, interleaved = (part.split() for part in path.removeprefix(_PREPARED).split("|"))
        tensors, vectors = ([_at(name, arguments) for name in names] for names in (factors, biases))
        return prepare_layers(tensors, vectors, interleaved == ["True"])

    def places(self, name: str) -> list[int]:
        """Return where in the flat inputs an argument stands that is a tensor."""
        return [index for index, path in enumerate(self.paths) if path == f"L['{name}']"]


def _at(path: str, arguments: Mapping[str, Any]) -> Any:
    value: Any = arguments
    for match in _STEP.finditer(path.removeprefix("L")):
        key, index, attribute, call = match.groups()
        if attribute is not None:
            value = getattr(value, attribute)() if call else getattr(value, attribute)
        else:
            value = value[key if index is None else int(index)]
    return value


def compile_program(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    dynamic: Mapping[str, Sequence[int]],
    file: Path | None,
    fast: bool = False,
) -> Program:
    """Compile a function, and keep the program in a file.

    Args:
        function: takes ``arguments`` by name, and returns tensors.
        arguments: examples; tensors, lists of tensors, and modules.
        dynamic: for an argument, which dimensions of its tensors may change.
        fast: whether factored layers may err by 1e-4, relative.
        file: where to keep the program; None, or a folder that cannot be written, for nowhere.
    """
    for name, dimensions in dynamic.items():
        value = arguments[name]
        for tensor in [value] if isinstance(value, Tensor) else value:
            for dimension in dimensions:
                dynamo.mark_dynamic(tensor, dimension)
    lowerings.register()
    programs: list[Program] = []

    def backend(gm: Any, examples: list[Any]) -> Callable[..., Any]:
        copy = dynamo.copy_graph(gm)
        paths, inputs = _prepared(copy, fast)
        artifact = inductor.compile_artifact(
            copy, inputs, {}, lowerings.fingerprint(), run_post_grad_pipeline
        )
        # Nobody asks at a call whether its sizes pass the guards.
        assumed = dynamo.assumed_sizes()
        if assumed:
            raise RuntimeError(f"sizes that may change are assumed to be others': {', '.join(assumed)}")
        if file is not None:
            _save(artifact, paths, file)
        programs.append(Program(artifact, paths))
        raise _Compiled

    # What is not marked is static, whatever other calls of the function had: a size that is a symbol by chance would be taken to
    # equal another one that is as large in the example.
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad():
            compiled(**arguments)
    except _Compiled:
        pass
    return programs[0]


def _prepared(gm: GraphModule, fast: bool) -> tuple[list[str], list[Any]]:
    """Rewrite a graph of Dynamo for one caller; return the paths of its inputs, and examples of them."""
    graph = gm.graph
    # What Dynamo knows of them: of real tensors, torch would take sizes for symbols that no call passes.
    inputs = {node: example_value(node) for node in graph.find_nodes(op="placeholder")}
    paths = {node: dynamo.path_of(node) for node in inputs}
    unknown = sorted(path for path in paths.values() if not path.startswith("L["))
    if unknown:
        raise RuntimeError(f"inputs that are no arguments: {', '.join(unknown)}")

    def add_input(name: str, tensor: Tensor) -> Node:
        node, inputs_example = dynamo.add_static_input(graph, name, tensor)
        inputs[node] = inputs_example
        return node

    if fast:
        allow_fast_sums(graph)
    if cpu_kernel.available():
        for item in prepare_layers_of(graph, add_input):
            made_of = [" ".join(paths[node] for node in nodes) for nodes in (item.factors, item.biases)]
            paths[item.node] = _PREPARED + "|".join([*made_of, str(item.interleaved)])
    for node in list(inputs):
        if not node.users and paths[node].startswith("L['model']"):
            graph.erase_node(node)
            del inputs[node]
    gm.recompile()
    order = graph.find_nodes(op="placeholder")
    return [paths[node] for node in order], [inputs[node] for node in order]


class _Compiled(BaseException):
    """Ends the work of Dynamo when a program is there: guards are not needed. No Exception, which Dynamo would wrap."""


def _save(artifact: Any, paths: Sequence[str], file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            partial.write_bytes("\n".join(paths).encode() + b"\0" + inductor.artifact_bytes(artifact))
    except OSError:  # a folder of somebody else, or a full disk: compiled again next time
        pass


def load_program(file: Path) -> Program | None:
    """Return the program of a file, or None if there is none, or none that this torch reads."""
    try:
        paths, _, content = file.read_bytes().partition(b"\0")
    except OSError:
        return None
    if not all(library() for library in _LIBRARIES):
        return None  # it was compiled where they are
    artifact = inductor.load_artifact(content)
    return None if artifact is None else Program(artifact, paths.decode().split("\n"))
