"""What a Triton kernel becomes in NVIDIA's machine code: compile without a GPU, disassemble, find the loops.

Known limits: made for sm_80 to sm_120; integer multiply-adds (IMAD) count as address arithmetic.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TARGETS = (80, 86, 89, 90, 100, 120)
# Bytes that one program may have, from the programming guides.
SHARED_MEMORY = {86: 99 << 10, 90: 227 << 10, "gfx942": 64 << 10}

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_BRANCH_TARGET = re.compile(r"(\.L_x_\d+)")
_MATRIX = re.compile(r"\w*MMA|IDP\w*")
_MULTIPLICATION = re.compile(r"[FHD](?:MUL|FMA)\d*")
_FLOAT32_ADDITION = re.compile(r"FADD\d*")
_LOCAL_MEMORY = re.compile(r"LDL|STL")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code, without its predicate."""

    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The operation without its modifiers: ``HADD2`` for ``HADD2.F32``."""
        return self.opcode.partition(".")[0]

    def additions(self) -> int:
        """Return how many float32 numbers this adds: FADD2 of Blackwell adds two."""
        return (2 if self.name == "FADD2" else 1) if _FLOAT32_ADDITION.fullmatch(self.name) else 0

    def multiplies_matrices(self) -> bool:
        """Return whether this is for a matrix unit, or a dot product of bytes."""
        return bool(_MATRIX.fullmatch(self.name)) and not self._is_constant()

    def multiplies(self) -> bool:
        """Return whether this multiplies floats, fused with an addition or not, in whatever unit."""
        scalar = bool(_MULTIPLICATION.fullmatch(self.name)) and not self._is_constant()
        return scalar or self.multiplies_matrices()

    def spills(self) -> bool:
        """Return whether this goes to local memory, where registers go that do not fit."""
        return bool(_LOCAL_MEMORY.fullmatch(self.name))

    def loads_16_bytes(self) -> bool:
        """Return whether a thread reads 16 bytes of global memory at once."""
        return self.name in ("LDG", "LDGSTS") and ".128" in self.opcode

    def _is_constant(self) -> bool:
        # HFMA2 R, -RZ, RZ, …: zero times zero plus a constant, to load it.
        _, *factors = (operand.strip(" -|") for operand in self.operands.split(",")[:3])
        return self.name == "HFMA2" and factors == ["RZ", "RZ"]


Code = tuple[Instruction, ...]


def compile_kernel(
    kernel: Any, target: int | str, dtype: str, M: int, settings: Mapping[str, int], scaled: bool = False
) -> Any:
    """Compile a kernel that reads signs as a launch would, for aligned tensors and N, K divisible by 16.

    Args:
        kernel: a ``triton.jit`` function with the arguments of ``decode_kernel``, ``prefill_kernel`` or ``dequantize_kernel``.
        target: 80 for sm_80, and so on; the name of an AMD architecture.
        dtype: Triton's name of the dtype of x, or w: fp32, bf16, fp16.
        M: rows of x, if it has such; 1 is compiled in, as Triton does at a launch.
        settings: the constexpr arguments, num_warps and num_stages.
        scaled: with scales and bias; else without any.

    Returns:
        What Triton compiled: ``asm["cubin"]`` is the machine code, or ``asm["amdgcn"]`` its text.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}
    vectors = dict.fromkeys(("in_scale_ptr", "out_scale_ptr", "bias_ptr", "scale_ptr"), "*fp16")
    constants = {name: value for name, value in settings.items() if name not in options}
    constants |= {} if scaled else dict.fromkeys(vectors)
    constants |= {"RAGGED": False, **({"M": 1} if M == 1 else {})}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            constants.setdefault(parameter.name, parameter.default if parameter.has_default else 4096)
    types = {"x_ptr": f"*{dtype}", "signs_ptr": "*i32", "y_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    types |= {**vectors, "w_ptr": f"*{dtype}"}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in constants and name != "M"
        },
    )
    gpu = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)
    # Fusion is allowed: nothing may hang on the compiler's being told not to multiply.
    return triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": True})


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor: registers of a thread, bytes of its stack."""

    registers: int
    stack: int


def resources(cubin: bytes) -> Resources:
    """Return what cuobjdump says of a compiled kernel."""
    from triton import knobs

    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(knobs.nvidia.nvdisasm.path).with_name("cuobjdump")
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return Resources(int(found[1]), int(found[2]))


def missing_tools() -> str | None:
    """Return why nothing can be compiled and disassembled here, or None if it can."""
    try:
        from triton import knobs

        _ = knobs.nvidia.ptxas.path, knobs.nvidia.nvdisasm.path  # raises where one is missing
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def disassemble(cubin: bytes) -> str:
    """Return the text of nvdisasm, with labels at the targets of branches."""
    from triton import knobs

    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> Code:
    """Return all instructions of a disassembled kernel."""
    return _parse(sass)[0]


def innermost_loops(sass: str) -> list[Code]:
    """Return the loops of a disassembled kernel that hold no other: from the target of a backward branch to the branch."""
    code, spans = _parse(sass)
    return [code[first : last + 1] for first, last in spans if not _holds_another((first, last), spans)]


def _parse(sass: str) -> tuple[Code, list[tuple[int, int]]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            here = len(code)
            code.append(Instruction(found[1], found[2]))
            target = _BRANCH_TARGET.search(found[2])
            # Every kernel ends in a branch to itself, which is no loop.
            if code[-1].name == "BRA" and target and labels.get(target[1], here) < here:
                spans.append((labels[target[1]], here))
    return tuple(code), spans


def _holds_another(span: tuple[int, int], spans: Iterable[tuple[int, int]]) -> bool:
    first, last = span
    return any(other != span and first <= other[0] and other[1] <= last for other in spans)
