"""What a Triton kernel becomes in NVIDIA's machine code: compile without a GPU, disassemble, find the loops.

Known limits: made for sm_80 to sm_90; integer multiply-adds (IMAD) count as address arithmetic.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TARGETS = (80, 89, 90)

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_BRANCH_TARGET = re.compile(r"(\.L_x_\d+)")
# Floating multiplications, fused or not, matrix units, and dot products of bytes.
_MULTIPLICATION = re.compile(r"[FHD](?:MUL|FMA)\d*|\w*MMA|IDP\w*")
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

    def is_constant(self) -> bool:
        """Return whether this is ``HFMA2 R, -RZ, RZ, …``: zero times zero plus a constant, to load it."""
        _, *factors = (operand.strip(" -|") for operand in self.operands.split(",")[:3])
        return self.name == "HFMA2" and factors == ["RZ", "RZ"]


@dataclass(frozen=True)
class Loop:
    """The body of an innermost loop, from the target of its backward branch to the branch."""

    body: tuple[Instruction, ...]

    def additions(self) -> list[Instruction]:
        """Return the float32 additions."""
        return [one for one in self.body if _FLOAT32_ADDITION.fullmatch(one.name)]

    def multiplications(self) -> list[Instruction]:
        """Return whatever multiplies floats, or anything in a matrix unit."""
        return [one for one in self.body if _MULTIPLICATION.fullmatch(one.name) and not one.is_constant()]

    def spills(self) -> list[Instruction]:
        """Return the accesses to local memory, where registers go that do not fit."""
        return [one for one in self.body if _LOCAL_MEMORY.fullmatch(one.name)]


def compile_kernel(kernel: Any, capability: int, dtype: str, M: int, blocks: Mapping[str, int]) -> bytes:
    """Compile a sign product as a launch would, for aligned tensors and N, K divisible by 16.

    Args:
        kernel: a ``triton.jit`` function with the arguments of ``sign_matmul_kernel``.
        capability: 80 for sm_80, and so on.
        dtype: Triton's name of the dtype of x: fp32, bf16, fp16.
        M: rows of x; 1 is compiled in, as Triton does at a launch.
        blocks: the constexpr arguments.

    Returns:
        The machine code, a cubin.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**blocks, **({"M": 1} if M == 1 else {})}
    types = {"x_ptr": f"*{dtype}", "signs_ptr": "*i32", "y_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "M"},
    )
    # Fusion is allowed: nothing may hang on the compiler's being told not to multiply.
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True}
    )
    cubin = compiled.asm["cubin"]
    assert isinstance(cubin, bytes)
    return cubin


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


def innermost_loops(sass: str) -> list[Loop]:
    """Return the loops of a disassembled kernel that hold no other loop."""
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
    return [
        Loop(tuple(code[first : last + 1]))
        for first, last in spans
        if not _holds_another((first, last), spans)
    ]


def _holds_another(span: tuple[int, int], spans: Iterable[tuple[int, int]]) -> bool:
    first, last = span
    return any(other != span and first <= other[0] and other[1] <= last for other in spans)
