"""Compiles functions ahead of time, to programs: see :mod:`dbf_compile.compiler.programs`."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dbf_compile.compiler import dynamo, inductor, lowerings, programs
from dbf_compile.compiler.programs import Program
from dbf_compile.passes.allow_fast_sums import allow_fast_sums
from dbf_compile.passes.graph import example_value
from dbf_compile.passes.pipeline import run_post_grad_pipeline
from dbf_compile.passes.prepare_layers import prepare_layers

# The operators ``dbf_native::….out`` that have a C function, which programs call.
_C_FUNCTIONS = ("sign_matmul", "double_binary_linear", "prepared_layers", "row_matmul", "cached_attention")
_SIZE = re.compile(r"(.+)\.size\(\)\[(\d+)\]")  # the path of an input that is a size, as Dynamo writes it


def compile_program(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    dynamic: Mapping[str, Sequence[int]],
    folder: Path | None,
    fast: bool = False,
) -> Program:
    """Compile a function, and keep the program in a folder.

    Args:
        function: takes ``arguments`` by name, and returns tensors.
        arguments: examples; tensors, lists of tensors, and modules, on a CPU.
        dynamic: for an argument, which dimensions of its tensors may change.
        fast: whether factored layers may err by 1e-4, relative.
        folder: where to keep the program; None, or one that cannot be written, for nowhere.

    Raises:
        RuntimeError: the function is for its examples' sizes alone, or reads what is no argument; no C++ compiler.
    """
    if not programs.has_kernels():
        raise RuntimeError("the C++ kernels cannot be built here")
    for name, dimensions in dynamic.items():
        value = arguments[name]
        for tensor in [value] if isinstance(value, Tensor) else value:
            for dimension in dimensions:
                dynamo.mark_dynamic(tensor, dimension)
    lowerings.register()
    results: list[Program | Exception] = []

    def backend(gm: Any, examples: list[Any]) -> Callable[..., Any]:
        try:
            results.append(_compile(gm, folder, fast))
        except Exception as error:  # Dynamo would wrap it
            results.append(error)
        raise _Compiled

    # What is not marked is static, whatever other calls of the function had: a size that is a symbol by chance would be taken to
    # equal another one that is as large in the example.
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad():
            compiled(**arguments)
    except _Compiled:
        pass
    if not results:
        raise RuntimeError("Dynamo is switched off")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _compile(gm: GraphModule, kept: Path | None, fast: bool) -> Program:
    """Compile a graph of Dynamo."""
    copy = dynamo.copy_graph(gm)
    paths, inputs = _prepared(copy, fast)
    c_functions = [getattr(torch.ops.dbf_native, name).out for name in _C_FUNCTIONS]
    fingerprint = lowerings.fingerprint()
    library = inductor.compile_library(copy, inputs, fingerprint, run_post_grad_pipeline, c_functions)
    # Nobody asks at a call whether its sizes pass the guards.
    assumed = dynamo.assumed_sizes()
    if assumed:
        raise RuntimeError(f"sizes that may change are fixed in it: {', '.join(assumed)}")
    if kept is not None:
        # A folder of somebody else, a full disk, or one without executable files: compiled again next time.
        with suppress(OSError, RuntimeError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            return _written(library, paths, kept.parent, kept)
    return _written(library, paths)


def _written(
    library: Path, paths: Sequence[str], parent: Path | None = None, kept: Path | None = None
) -> Program:
    """Write a program to a folder and open it; ``kept`` is its name, None removes it: what is loaded needs no file."""
    with tempfile.TemporaryDirectory(prefix="dbf_program_", dir=parent) as place:
        folder = Path(place, "program")
        folder.mkdir()
        programs.write_program(library, paths, folder)
        program = programs.open_program(folder)
        if kept is not None:
            _rename(folder, kept)
    return program


def _rename(folder: Path, kept: Path) -> None:
    """Let a folder take its name, but not from a sound program, which another process may have loaded."""
    with suppress(OSError):
        folder.rename(kept)
        return
    if programs.load_program(kept) is None:
        shutil.rmtree(kept, ignore_errors=True)
        with suppress(OSError):
            folder.rename(kept)


def _prepared(gm: GraphModule, fast: bool) -> tuple[list[str], list[Any]]:
    """Rewrite a graph of Dynamo for one caller; return the paths of its inputs, and examples of them."""
    graph = gm.graph
    paths = {node: dynamo.path_of(node) for node in graph.find_nodes(op="placeholder")}
    unknown = sorted(path for path in paths.values() if not path.startswith("L["))
    if unknown:
        raise RuntimeError(f"inputs that are no arguments: {', '.join(unknown)}")
    if fast:
        allow_fast_sums(graph)
    for item in prepare_layers(graph, lambda name, tensor: dynamo.add_static_input(graph, name, tensor)[0]):
        made_of = [" ".join(paths[node] for node in nodes) for nodes in (item.factors, item.biases)]
        paths[item.node] = programs.PREPARED + "|".join([*made_of, str(item.interleaved)])
    _take_sizes_from_tensors(graph, paths)
    for node, path in paths.items():
        if not node.users and path.startswith("L['model']"):
            graph.erase_node(node)
    gm.recompile()
    order = graph.find_nodes(op="placeholder")
    # What Dynamo knows of them: of real tensors, torch would take sizes for symbols that no call passes.
    return [paths[node] for node in order], [example_value(node) for node in order]


def _take_sizes_from_tensors(graph: Graph, paths: dict[Node, str]) -> None:
    """Replace inputs that are sizes of others: a program takes tensors alone."""
    by_path = {path: node for node, path in paths.items()}
    *_, last = graph.find_nodes(op="placeholder")
    for node in [node for node in paths if not isinstance(example_value(node), Tensor)]:
        match = _SIZE.fullmatch(paths[node])
        tensor = by_path.get(match[1]) if match else None
        if match is None or tensor is None:
            raise RuntimeError(f"an input that is neither a tensor nor a size of one: {paths[node]}")
        with graph.inserting_after(last):
            size = graph.call_function(torch.ops.aten.sym_size.int, (tensor, int(match[2])))
        size.meta = dict(node.meta)
        node.replace_all_uses_with(size)
        graph.erase_node(node)
        del paths[node]


class _Compiled(BaseException):
    """Ends the work of Dynamo: guards are not needed. No Exception, which Dynamo would wrap."""
