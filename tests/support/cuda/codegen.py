"""Compiles layers for a pretended CUDA device, and prints the programs that Inductor generates.

Nothing runs: tensors are fake, and :mod:`support.cuda.pretended` answers for the driver. Its patches last until the
process ends; so :func:`generate_all` starts one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.cuda import sass
from support.cuda.models import CACHED_TOKENS, Block, Deep, Overwritten, Plain, Siblings, llama
from support.cuda.pretended import pretend_cuda
from support.forked import Forked
from support.models.architectures import batches, random_factored_model, settings_of
from support.strategies import random_factors
from torch.nn import Parameter

from dbf_compile.factors import TENSOR_NAMES
from dbf_compile.linear import DoubleBinaryLinear


@dataclass(frozen=True)
class Case:
    """A layer of R middle columns between K inputs and N outputs, called with M tokens."""

    K: int
    R: int
    N: int
    M: int
    dtype: str = "bfloat16"
    dynamic: bool = False

    def __str__(self) -> str:
        rows = f"{self.M}-dynamic" if self.dynamic else str(self.M)
        return f"{rows}x{self.K}-{self.R}-{self.N}-{self.dtype}"


CASES = (
    *(Case(256, 192, 320, M, dtype) for M in (1, 6) for dtype in ("float32", "bfloat16", "float16")),
    *(Case(256, 192, 320, 40, dtype) for dtype in ("float32", "bfloat16", "float16")),
    *(Case(256, 192, 320, 200, dtype) for dtype in ("float32", "bfloat16", "float16")),
    Case(67, 33, 129, M=200),
    Case(256, 192, 320, M=6, dynamic=True),
    Case(67, 33, 129, M=5),
    Case(67, 33, 129, M=5, dtype="float64"),
)


NEEDS = [
    pytest.mark.skipif(
        sass.missing_tools() is not None, reason=f"cannot compile for NVIDIA: {sass.missing_tools()}"
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]
TUNED = (Case(256, 192, 320, M=1, dtype="bfloat16"), Case(256, 192, 320, M=40), Case(67, 33, 129, M=200))
BLOCK_TOKENS = (1, 64)
SIBLING_TOKENS = (1, 6, 64)
DEEP_TOKENS = (1, 3)
PLAIN_TOKENS = 200
LLAMA_TOKENS = (1, 20, 160)
# Numbers of tokens, for the kernels for few and for many. Left out are kinds with experts, whose graphs break; Llama, which is
# among the layers' programs; Mistral, which is a Llama at this size; and OPT, whose blocks are GPT-2's.
ARCHITECTURE_TOKENS = {
    **dict.fromkeys(("qwen3", "gemma3", "phi", "phi3", "gpt2"), 6),
    **dict.fromkeys(("bert", "vit", "whisper"), 24),
}
NO_FOLDING = {"joint_graph_constant_folding": False}  # it would compute constants on the device
TUNING = {"max_autotune": True}
COMBINED = {"combo_kernels": True}  # Inductor combines independent kernels into one


@dataclass(frozen=True)
class Program:
    """The program that Inductor generates for one case.

    Attributes:
        call: the Python method that launches, ``call(self, args)``.
        kernels: sources of the Triton kernels by name.
        cubins: machine code, in hexadecimal, of those that read signs; of one program of each kind, and not of whole models,
            since they launch what layers do.
        copied: shapes of the inputs that a replay of its CUDA graph would copy, because other calls pass other tensors.
        obstacle: why Inductor would record no CUDA graph; "" if it would.
    """

    call: str
    kernels: dict[str, str]
    cubins: dict[str, str]
    copied: list[str]
    obstacle: str


def generate_all(what: str) -> dict[str, Program]:
    """Compile all "layers" or all "architectures" in a process of their own, which starts no others."""
    code = "import sys; from support.cuda import codegen; codegen.print_all(sys.argv[1])"
    done = Forked(code, what, paths=(Path(__file__).parents[2],)).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    programs = json.loads(done.stdout.splitlines()[-1])
    return {name: Program(**fields) for name, fields in programs.items()}


def run_program(path: Path, text: str, **environment: str) -> Any:
    """Run a file of this folder as a program and return the JSON of its last line of output.

    Args:
        path: of the file.
        text: the program's standard input.
        environment: variables beside those of this process.
    """
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **environment},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def print_all(what: str) -> None:
    """Print, as JSON, the programs of all "layers" or all "architectures"."""
    pretend_cuda()
    with torch._inductor.config.patch(compile_threads=1):
        programs = {"layers": _layers, "architectures": _architectures}[what]()
    print(json.dumps({name: asdict(program) for name, program in programs.items()}))


def _layers() -> dict[str, Program]:
    programs = {str(case): _generate_layer(case, machine_code=True) for case in CASES}
    for M in SIBLING_TOKENS:
        programs[f"siblings of {M}"] = _generate(Siblings(), M, 256, torch.bfloat16, machine_code=M == 1)
    for M in DEEP_TOKENS:
        programs[f"deep of {M}"] = _generate(Deep(True), M, 2100, torch.bfloat16, machine_code=M == 1)
    programs["chain"] = _generate(Deep(False), 1, 2100, torch.bfloat16)
    programs["plain"] = _generate(Plain(), PLAIN_TOKENS, Plain.SIZE[1], torch.bfloat16, machine_code=True)
    programs["overwritten"] = _generate(Overwritten(), 1, 2100, torch.float32)
    with _tuning():
        programs |= {f"tuned {case}": _generate_layer(case, TUNING) for case in TUNED}
        programs["tuned deep of 1"] = _generate(Deep(True), 1, 2100, torch.bfloat16, inductor=TUNING)
    for M in BLOCK_TOKENS:
        programs[f"block of {M}"] = _generate(Block(), M, 256, torch.bfloat16, machine_code=M == 1)
    programs["apart"] = _generate(Siblings(apart=True), 1, 256, torch.bfloat16, inductor=COMBINED)
    if find_spec("transformers"):
        programs |= {f"llama of {M}": _generate_llama("dbf", M) for M in LLAMA_TOKENS}
        programs["combined llama"] = _generate_llama("dbf", 1, COMBINED)
        programs["dense llama"] = _generate_llama("inductor", 1)
    return programs


def _architectures() -> dict[str, Program]:
    return {name: _generate_architecture(name, M) for name, M in ARCHITECTURE_TOKENS.items()}


def _generate_architecture(name: str, M: int) -> Program:
    """Compile a model of one block for M tokens, or for a picture or sound."""
    model = random_factored_model(name, blocks=1)
    with _on_pretended_device(model, torch.bfloat16):
        batch = {
            key: torch.empty(
                value.shape, dtype=torch.bfloat16 if value.is_floating_point() else value.dtype, device="cuda"
            )
            for key, value in next(batches(name, M)).items()
        }
        step = torch.compile(
            model, backend="dbf", options={"inductor": NO_FOLDING}, fullgraph=True, dynamic=False
        )
        return _program(lambda _: step(**batch, **settings_of(name)), None)


def _generate_layer(
    case: Case, inductor: dict[str, Any] | None = None, machine_code: bool = False
) -> Program:
    dtype = getattr(torch, case.dtype)
    layer = DoubleBinaryLinear(random_factors(case.K, case.R, case.N), torch.zeros(case.N, dtype=dtype))
    return _generate(layer, case.M, case.K, dtype, case.dynamic, inductor, machine_code)


def _generate_llama(backend: str, M: int, settings: dict[str, Any] | None = None) -> Program:
    """Compile a Llama for M tokens and a static cache."""
    from transformers import StaticCache

    model = llama(factored=backend == "dbf")
    inductor = {**(settings or {}), **NO_FOLDING}
    options = {"inductor": inductor} if backend == "dbf" else inductor
    step = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
    with _on_pretended_device(model, torch.bfloat16):
        tokens = torch.empty(1, M, dtype=torch.int64, device="cuda")
        cache = StaticCache(config=model.config, max_cache_len=CACHED_TOKENS)
        for layer in cache.layers:
            for name, tensor in list(vars(layer).items()):
                if isinstance(tensor, torch.Tensor):
                    setattr(layer, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        heads, size = model.config.num_key_value_heads, model.config.head_dim
        cache.early_initialization(1, heads, size, torch.bfloat16, tokens.device)
        positions = torch.empty_like(tokens)
        call = functools.partial(step, past_key_values=cache, position_ids=positions)
        return _program(call, tokens)


def _generate(
    model: torch.nn.Module,
    M: int,
    K: int,
    dtype: torch.dtype,
    dynamic: bool = False,
    inductor: dict[str, Any] | None = None,
    machine_code: bool = False,
) -> Program:
    with _on_pretended_device(model, dtype):
        x = torch.empty(M, K, dtype=dtype, device="cuda")
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        options = {"inductor": inductor or {}}
        return _program(torch.compile(model, backend="dbf", options=options, fullgraph=True), x, machine_code)


@contextmanager
def _on_pretended_device(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Move a model to the pretended device, its parameters but factors to ``dtype``, and enter fake mode."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    torch.compiler.reset()
    moved: dict[int, torch.Tensor] = {}  # shared tensors stay shared

    def on_device(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if id(tensor) not in moved:
            fake = torch.empty(tensor.shape, dtype=dtype, device="cuda")
            is_parameter = isinstance(tensor, Parameter)
            moved[id(tensor)] = Parameter(fake, requires_grad=False) if is_parameter else fake
        return moved[id(tensor)]

    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_buffers(recurse=False)]:
                setattr(module, name, on_device(tensor, tensor.dtype))
            for name, tensor in [*module.named_parameters(recurse=False)]:
                setattr(module, name, on_device(tensor, tensor.dtype if name in TENSOR_NAMES else dtype))
        yield


@contextmanager
def _tuning() -> Iterator[None]:
    """Let Inductor tune with made-up times: the last setting of our kernels is the fastest, and fusion always pays."""
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def times(_: Any, name: str, *args: Any, **__: Any) -> dict[Any, float]:
        choices = next(item for item in args if isinstance(item, list) and hasattr(item[0], "output_node"))
        ordered = reversed(choices) if name.startswith("dbf") else choices
        return {choice: 1.0 + place for place, choice in enumerate(ordered)}

    with (
        mock.patch.object(AlgorithmSelectorCache, "do_autotuning", times),
        mock.patch.object(Scheduler, "benchmark_fused_nodes", lambda *_, **__: (0.5, "")),
        mock.patch.object(Scheduler, "benchmark_codegened_module", lambda *_, **__: (0.5, "")),
    ):
        yield


def _program(compiled: Any, x: torch.Tensor, machine_code: bool = False) -> Program:
    source, copied, obstacle = _lowered(compiled, x)
    kernels = re.findall(r"(\w+) = async_compile\.triton\('(\w+)', '''\n(.*?)'''", source, re.S)
    return Program(
        call=textwrap.dedent(re.search(r"    def call\(.*?\n        return [^\n]*\n", source, re.S)[0]),
        kernels={name: text for name, _, text in kernels},
        cubins={
            name: _cubin(symbol, text).hex()
            for name, symbol, text in kernels
            if machine_code and name.startswith("triton_tem")
        },
        copied=copied,
        obstacle=obstacle,
    )


_KERNEL = "triton_tem_kernel"


class _CapturedError(Exception):
    pass


def _lowered(compiled: Any, x: torch.Tensor) -> tuple[str, list[str], str]:
    """Return the source that Inductor generates for ``compiled(x)``, and Program's ``copied`` and ``obstacle``; run nothing."""
    from torch._guards import TracingContext
    from torch._inductor.graph import GraphLowering

    lowered: list[tuple[str, list[str], str]] = []

    def stop(graph: Any) -> None:
        static = TracingContext.get().fw_metadata.static_input_indices
        inputs = [graph.graph_inputs[name] for name in graph.graph_input_names]
        others = [one for index, one in enumerate(inputs) if index not in static and hasattr(one, "get_size")]
        source = graph.codegen()[0].value
        lowered.append((source, [str(tuple(one.get_size())) for one in others], _obstacle(graph, static)))
        raise _CapturedError

    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compiled(x)
        except Exception:
            if not lowered:
                raise
    return lowered[0]


def _obstacle(graph: Any, static: Sequence[int]) -> str:
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    written = [index for index in graph.mutated_input_idxs if index not in static]
    if written:
        return f"inputs {written} are written to, and other calls pass other tensors"
    devices = check_multiple_devices_or_any_cpu_nodes(dict(graph.device_node_mapping))
    return (
        graph.disable_cudagraphs_reason
        or devices
        or str(get_first_incompatible_cudagraph_node(graph.module) or "")
    )


def _cubin(name: str, source: str) -> bytes:
    """Return the machine code of a kernel, compiled as its program would; kernels that differ in name alone share it."""
    return _compiled_cubin(source.replace(name, _KERNEL))


@functools.cache
def _compiled_cubin(source: str) -> bytes:
    from torch._inductor.codecache import PyCodeCache

    kernel = getattr(PyCodeCache.load(source), _KERNEL)
    with torch._inductor.config.patch(use_static_cuda_launcher=False):  # it would drop the machine code
        kernel.precompile(warm_cache_only=True)
    compiled = kernel.compile_results[0].kernel
    return bytes(compiled.asm["cubin"])
