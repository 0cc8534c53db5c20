"""The claim "additions only", read from the machine code of the Triton kernel; no GPU is needed."""

from __future__ import annotations

import math
import os

import pytest
from support import sass

pytestmark = [
    pytest.mark.skipif(
        sass.missing_tools() is not None, reason=f"cannot compile for NVIDIA: {sass.missing_tools()}"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and compiles nothing"
    ),
]

THREADS = 128
DTYPES = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("M", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_the_loop_adds_once_for_every_sign_and_never_multiplies(capability: int, dtype: str, M: int) -> None:
    from dbf_compile.kernels.sign_matmul.triton_kernel import block_sizes, sign_matmul_kernel

    blocks = block_sizes(M, 4096, 4096)
    cubin = sass.compile_kernel(sign_matmul_kernel, capability, dtype, M, blocks)
    (loop,) = sass.innermost_loops(sass.disassemble(cubin))
    assert not loop.multiplications()
    assert len(loop.additions()) == math.prod(blocks.values()) * 32 // THREADS
    assert not loop.spills()


@pytest.mark.parametrize("capability", sass.TARGETS)
def test_a_kernel_that_multiplies_is_seen(capability: int) -> None:
    from support.multiplying_kernel import multiplying_kernel

    blocks = {"BLOCK_M": 1, "BLOCK_N": 1, "BLOCK_W": 4}
    cubin = sass.compile_kernel(multiplying_kernel, capability, "bf16", 64, blocks)
    loops = sass.innermost_loops(sass.disassemble(cubin))
    assert any(loop.multiplications() for loop in loops)


@pytest.mark.parametrize(
    ("line", "multiplies"),
    [
        ("FADD R4, R4, R5", False),
        ("HADD2.F32 R4, -RZ, R5.H0_H0", False),
        ("IMAD.WIDE R2, R21, 0x4, R4", False),
        ("HFMA2.MMA R28, -RZ, RZ, 0, 0", False),
        ("HFMA2.MMA R28, R3, R4, R28", True),
        ("@!P0 FFMA R4, R4, R5, R6", True),
        ("FMUL R4, R4, R5", True),
        ("FMUL.FTZ R4, R4, R5", True),
        ("HMUL2.BF16 R4, R4, R5", True),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", True),
        ("HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", True),
        ("IMMA.16832.S8.S8 R4, R8, R12, R4", True),
        ("DFMA R4, R4, R6, R8", True),
    ],
)
def test_what_counts_as_a_multiplication(line: str, multiplies: bool) -> None:
    code = f".L_x_0:\n        /*0000*/  {line} ;\n        /*0010*/  @P0 BRA `(.L_x_0) ;\n"
    (loop,) = sass.innermost_loops(code)
    assert bool(loop.multiplications()) == multiplies
