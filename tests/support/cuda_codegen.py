"""Compiles layers for a CUDA device that is not there, and prints the program Inductor makes of them.

Nothing is run: tensors are fake, and what torch and Triton ask the driver is answered here, for an H100. All that is
patched stays patched; hence this file is a program, which :func:`generate_all` starts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from support.shared_library import build
from support.strategies import random_factors, random_signs
from torch.nn import Parameter

from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.signs import interleave, pack_signs

CAPABILITY = (9, 0)


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


BLOCK_TOKENS = (1, 64)
SIBLING_TOKENS = (1, 6, 64)
DEEP_TOKENS = (1, 3)
PLAIN_TOKENS = 200
LLAMA_BLOCKS = 2
COMBINED = {"combo_kernels": True}  # Inductor's own, for kernels that have nothing to do with each other


@dataclass(frozen=True)
class Program:
    """What Inductor generated for one case.

    Attributes:
        call: the Python method that launches, ``call(self, args)``.
        kernels: sources of the Triton kernels by name.
        cubins: machine code, in hexadecimal, of those that read signs.
    """

    call: str
    kernels: dict[str, str]
    cubins: dict[str, str]


def generate_all() -> dict[str, Program]:
    """Compile all cases in a process of their own."""
    found = run_program(Path(__file__), given="")
    return {name: Program(**fields) for name, fields in found.items()}


def run_program(path: Path, given: str, **environment: str) -> Any:
    """Run a file of this folder as a program and return what its last line says in JSON.

    Args:
        path: the file.
        given: its standard input.
        environment: variables on top of this process's.
    """
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        input=given,
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **environment},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the programs of all cases as JSON."""
    pretend_cuda()
    programs = {str(case): _generate_layer(case) for case in CASES}
    programs |= {f"siblings of {M}": _generate(Siblings(), M, 256, torch.bfloat16) for M in SIBLING_TOKENS}
    programs |= {f"deep of {M}": _generate(Deep(True), M, 2100, torch.bfloat16) for M in DEEP_TOKENS}
    programs["chain"] = _generate(Deep(False), 1, 2100, torch.bfloat16)
    programs["plain"] = _generate(Plain(), PLAIN_TOKENS, Plain.SIZE[1], torch.bfloat16)
    programs["overwritten"] = _generate(Overwritten(), 1, 2100, torch.float32)
    programs |= {f"block of {M}": _generate(_Block(), M, 256, torch.bfloat16) for M in BLOCK_TOKENS}
    programs["apart"] = _generate(Siblings(apart=True), 1, 256, torch.bfloat16, inductor=COMBINED)
    if find_spec("transformers"):
        programs["dense llama"] = _generate_llama("inductor")
        programs["llama"] = _generate_llama("dbf")
        programs["combined llama"] = _generate_llama("dbf", **COMBINED)
    print(json.dumps({name: asdict(program) for name, program in programs.items()}))


class Siblings(torch.nn.Module):
    """Three layers that were factored as one and have their first stage in common, as q, k and v.

    Args:
        apart: return their results as they are; else one behind the other.
    """

    ROWS = (33, 320, 96)

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_siblings(256, 192, self.ROWS))
        self.apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        found = [layer(x) for layer in self.layers]
        return found if self.apart else torch.cat(found, dim=-1)


def _siblings(K: int, R: int, rows: Sequence[int]) -> list[DoubleBinaryLinear]:
    """Return layers that were factored as one."""
    return [DoubleBinaryLinear(factors) for factors in random_factors(K, R, sum(rows)).split(rows)]


class Deep(torch.nn.Module):
    """Two layers of many columns: one token's sums stay in parts, for the next layer or the activation to add up.

    Args:
        both: return what is between the layers, too; else the activation becomes part of the first layer's kernel.
    """

    def __init__(self, both: bool) -> None:
        super().__init__()
        sizes = ((2100, 1090, 1060), (1060, 40, 70))
        self.first, self.second = (DoubleBinaryLinear(random_factors(*size)) for size in sizes)
        self.both = both

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        z = torch.relu(self.first(x))
        return (self.second(z), z) if self.both else self.second(z)


class Plain(torch.nn.Module):
    """A product of many tokens without scales, and one with words row after row."""

    SIZE = (48, 600)

    def __init__(self) -> None:
        super().__init__()
        words = pack_signs(random_signs(*self.SIZE, seed=0))
        self.register_buffer("interleaved", interleave(words))
        self.register_buffer("in_rows", words)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        many = torch.ops.dbf.sign_matmul(x, self.interleaved, dtype=x.dtype, interleaved=True)
        return many, torch.ops.dbf.sign_matmul(x, self.in_rows, dtype=x.dtype)


class Overwritten(torch.nn.Module):
    """Two products with signs, where somebody writes to what is between them."""

    SIZES = ((1090, 2100), (1060, 1090))

    def __init__(self) -> None:
        super().__init__()
        for index, size in enumerate(self.SIZES):
            self.register_buffer(f"signs{index}", interleave(pack_signs(random_signs(*size, seed=index))))
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.ops.dbf.sign_matmul(x, self.signs0, interleaved=True)
        h = h.index_put((h > 3,), self.zero)
        return torch.ops.dbf.sign_matmul(h, self.signs1, interleaved=True)


class _Block(torch.nn.Module):
    """Half a block of a Llama: a norm, three factored layers, the activation between them, and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(256)
        self.gate, self.up = (DoubleBinaryLinear(random_factors(256, 192, 512)) for _ in range(2))
        self.down = DoubleBinaryLinear(random_factors(512, 192, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(z)) * self.up(z))


def _generate_layer(case: Case) -> Program:
    dtype = getattr(torch, case.dtype)
    layer = DoubleBinaryLinear(random_factors(case.K, case.R, case.N), torch.zeros(case.N, dtype=dtype))
    return _generate(layer, case.M, case.K, dtype, case.dynamic)


def _generate_llama(backend: str, **inductor: Any) -> Program:
    """Compile the step that decodes one token, with a static cache; all layers but the head are factored for dbf."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LLAMA_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    model = LlamaForCausalLM(config).eval()
    for block in model.model.layers if backend == "dbf" else []:
        q_k_v, gate_up = _siblings(256, 192, (256, 128, 128)), _siblings(256, 192, (512, 512))
        block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj = q_k_v
        block.mlp.gate_proj, block.mlp.up_proj = gate_up
        block.self_attn.o_proj = DoubleBinaryLinear(random_factors(256, 192, 256))
        block.mlp.down_proj = DoubleBinaryLinear(random_factors(512, 192, 256))
    inductor["joint_graph_constant_folding"] = False  # would make constants on the device
    options = {"inductor": inductor} if backend == "dbf" else inductor
    with _on_pretended_device(model, torch.bfloat16):
        cache = StaticCache(config=config, max_cache_len=64)
        for layer in cache.layers:
            for name, tensor in list(vars(layer).items()):
                if isinstance(tensor, torch.Tensor):
                    setattr(layer, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        cache.early_initialization(1, 2, 64, torch.bfloat16, torch.device("cuda"))
        tokens = torch.empty(1, 1, dtype=torch.int64, device="cuda")
        step = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
        return _program(
            lambda ids: step(ids, past_key_values=cache, position_ids=torch.empty_like(tokens)), tokens
        )


def _generate(
    model: torch.nn.Module,
    M: int,
    K: int,
    dtype: torch.dtype,
    dynamic: bool = False,
    inductor: dict[str, Any] | None = None,
) -> Program:
    with _on_pretended_device(model, dtype):
        x = torch.empty(M, K, dtype=dtype, device="cuda")
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        options = {"inductor": inductor or {}}
        return _program(torch.compile(model, backend="dbf", options=options, fullgraph=True), x)


@contextmanager
def _on_pretended_device(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Move a model there, its parameters to ``dtype``, and have what follows happen there."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    torch.compiler.reset()
    moved: dict[int, torch.Tensor] = {}  # what layers share, they go on sharing
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_buffers(recurse=False)]:
                if id(tensor) not in moved:
                    moved[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                setattr(module, name, moved[id(tensor)])
            for name, tensor in [*module.named_parameters(recurse=False)]:
                made = torch.empty(tensor.shape, dtype=dtype, device="cuda")
                setattr(module, name, Parameter(made, requires_grad=False))
        yield


def _program(compiled: Any, x: torch.Tensor) -> Program:
    source = _source_of(compiled, x)
    found = re.findall(r"(\w+) = async_compile\.triton\('(\w+)', '''\n(.*?)'''", source, re.S)
    return Program(
        call=textwrap.dedent(re.search(r"    def call\(.*?\n        return [^\n]*\n", source, re.S)[0]),
        kernels={name: text for name, _, text in found},
        cubins={
            name: _cubin(symbol, text).hex() for name, symbol, text in found if name.startswith("triton_tem")
        },
    )


class _CapturedError(Exception):
    pass


def _source_of(compiled: Any, x: torch.Tensor) -> str:
    """Return the program that Inductor writes for ``compiled(x)``, and stop it there."""
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def stop(graph: Any) -> None:
        sources.append(graph.codegen()[0].value)
        raise _CapturedError

    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compiled(x)
        except Exception:
            if not sources:
                raise
    (source,) = sources
    return source


def _cubin(name: str, source: str) -> bytes:
    """Compile a kernel of a generated program as that program would."""
    from torch._inductor.codecache import PyCodeCache

    kernel = getattr(PyCodeCache.load(source), name)
    with torch._inductor.config.patch(
        use_static_cuda_launcher=False
    ):  # which would let go of the machine code
        kernel.precompile(warm_cache_only=True)
    compiled = kernel.compile_results[0].kernel
    return bytes(compiled.asm["cubin"])


def pretend_cuda() -> None:
    """Answer for an H100 wherever torch or Triton would ask the driver, until this process ends."""
    import torch._inductor.runtime.triton_helpers
    import torch._inductor.utils
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._subclasses import fake_tensor
    from triton.runtime import driver

    major, minor = CAPABILITY
    properties = SimpleNamespace(
        name="pretended",
        major=major,
        minor=minor,
        multi_processor_count=132,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        gcnArchName="",
        L2_cache_size=50 << 20,
        is_integrated=False,
    )

    def answer(owner: Any, **answers: Any) -> None:
        for name, value in answers.items():
            setattr(owner, name, value if callable(value) else lambda *_, _value=value, **__: _value)

    device_interface.get_interface_for_device("cuda")  # registers the true ones, which are then replaced
    worker = type("Worker", (), {})
    interface = type("PretendedInterface", (device_interface.CudaInterface,), {"Worker": worker})
    names = ("set_device", "current_device", "get_device_properties")
    known = dict(zip(names, (None, 0, properties), strict=True))
    for owner, answers in (
        (worker, known),
        (
            interface,
            {
                **known,
                "device_count": 1,
                "synchronize": None,
                "exchange_device": 0,
                "maybe_exchange_device": 0,
                "is_bf16_supported": True,
                "is_available": True,
                "get_compute_capability": 10 * major + minor,
                "is_triton_capable": True,
                "raise_if_triton_unavailable": None,
            },
        ),
    ):
        for name, value in answers.items():
            setattr(owner, name, staticmethod(lambda *_, _value=value, **__: _value))
    device_interface.device_interfaces.update({"cuda": interface, "cuda:0": interface})

    answer(
        torch.cuda,
        is_available=True,
        is_initialized=True,
        current_device=0,
        device_count=1,
        get_device_properties=properties,
        get_device_capability=CAPABILITY,
        get_device_name="pretended",
        set_device=None,
        synchronize=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
        is_bf16_supported=True,
        _lazy_init=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
    )
    answer(torch.cuda.random, current_device=0)
    with TemporaryDirectory() as folder:
        torch.ops.load_library(build(Path(__file__).with_name("cuda_guard.cpp"), Path(folder)))
    answer(torch.accelerator, is_available=False, current_device_index=0)
    torch.version.cuda = torch.version.cuda or "13.0"
    answer(fake_tensor, init_gpu_context=None)
    answer(torch._inductor.runtime.triton_helpers, set_driver_to_gpu=None)
    answer(torch._inductor.utils, is_big_gpu=True)
    # These register patterns with tensors on the device.
    answer(misc_patterns, _misc_patterns_init=None)
    answer(fuse_attention, _sfdp_init=None)
    answer(pad_mm, _pad_mm_init=None)
    driver.set_active(_Driver())


class _Driver:
    """What Triton asks its driver while it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


if __name__ == "__main__":
    main()
