"""The machine code of Triton kernels for NVIDIA: compiles without a GPU, disassembles, finds loops.

Limits: for sm_80 to sm_120 only; integer multiply-adds (IMAD) count as address arithmetic.
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
# Bytes of shared memory that one program may use, from the programming guides.
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
        """Return the number of float32 additions: 2 for FADD2 of Blackwell."""
        return (2 if self.name == "FADD2" else 1) if _FLOAT32_ADDITION.fullmatch(self.name) else 0

    def multiplies_matrices(self) -> bool:
        """Return whether this runs on a matrix unit, or is a dot product of bytes."""
        return bool(_MATRIX.fullmatch(self.name)) and not self._is_constant()

    def multiplies(self) -> bool:
        """Return whether this multiplies floats, alone or fused with an addition, on any unit."""
        scalar = bool(_MULTIPLICATION.fullmatch(self.name)) and not self._is_constant()
        return scalar or self.multiplies_matrices()

    def spills(self) -> bool:
        """Return whether this accesses local memory, which holds spilled registers."""
        return bool(_LOCAL_MEMORY.fullmatch(self.name))

    def loads_16_bytes(self) -> bool:
        """Return whether a thread reads 16 bytes of global memory at once."""
        return self.name in ("LDG", "LDGSTS") and ".128" in self.opcode

    def _is_constant(self) -> bool:
        # HFMA2 R, -RZ, RZ, … loads a constant: zero times zero plus the constant.
        _, *factors = (operand.strip(" -|") for operand in self.operands.split(",")[:3])
        return self.name == "HFMA2" and factors == ["RZ", "RZ"]


Code = tuple[Instruction, ...]


def compile_kernel(
    kernel: Any, target: int | str, dtype: str, M: int, settings: Mapping[str, int], scaled: bool = False
) -> Any:
    """Compile a kernel that reads signs as a launch does, for aligned tensors and N, K divisible by 16.

    Args:
        kernel: a ``triton.jit`` function with the arguments of ``decode_kernel``, ``prefill_kernel`` or ``dequantize_kernel``.
        target: 80 for sm_80, and so on; the name of an AMD architecture.
        dtype: Triton's name of the dtype of x, or w: fp32, bf16, fp16.
        M: rows of x, if the kernel has x; 1 becomes a constant, as at a launch.
        settings: the constexpr arguments, num_warps and num_stages.
        scaled: with scales and bias, or with none.

    Returns:
        The compiled kernel: ``asm["cubin"]`` is its machine code, or ``asm["amdgcn"]`` its text.
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
    # Fusion is allowed: the tests must not depend on an option against it.
    return triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": True})


@dataclass(frozen=True)
class Resources:
    """The registers of a thread, and the bytes of its stack."""

    registers: int
    stack: int


def resources(cubin: bytes) -> Resources:
    """Return the resources of a compiled kernel, from cuobjdump."""
    from triton import knobs

    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(knobs.nvidia.nvdisasm.path).with_name("cuobjdump")
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert match is not None, done.stdout
    return Resources(int(match[1]), int(match[2]))


def missing_tools() -> str | None:
    """Return why kernels cannot be compiled and disassembled here, or None if they can."""
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
    """Return the innermost loops of a disassembled kernel, each from the target of a backward branch to the branch."""
    code, spans = _parse(sass)
    return [code[first : last + 1] for first, last in spans if not _holds_another((first, last), spans)]


def _parse(sass: str) -> tuple[Code, list[tuple[int, int]]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            here = len(code)
            code.append(Instruction(match[1], match[2]))
            target = _BRANCH_TARGET.search(match[2])
            # Every kernel ends in a branch to itself, which is no loop.
            if code[-1].name == "BRA" and target and labels.get(target[1], here) < here:
                spans.append((labels[target[1]], here))
    return tuple(code), spans


def _holds_another(span: tuple[int, int], spans: Iterable[tuple[int, int]]) -> bool:
    first, last = span
    return any(other != span and first <= other[0] and other[1] <= last for other in spans)
