"""What the Triton kernels become for each architecture, read from their machine code; no GPU is needed."""

from __future__ import annotations

import os
import re

import pytest
from support import sass

pytest.importorskip("triton")

from dbf_compile.kernels.sign_matmul.triton_decode import decode_blocks, decode_kernel
from dbf_compile.kernels.sign_matmul.triton_prefill import prefill_blocks, prefill_kernel

pytestmark = [
    pytest.mark.skipif(
        sass.missing_tools() is not None, reason=f"cannot compile for NVIDIA: {sass.missing_tools()}"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and compiles nothing"
    ),
]


@pytest.mark.parametrize(("M", "dtype"), [(1, "fp32"), (1, "bf16"), (1, "fp16"), (16, "bf16")])
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_few_tokens_cost_one_test_a_sign_and_one_addition_a_token(
    capability: int, dtype: str, M: int
) -> None:
    settings = decode_blocks(M, 4096, 4096)[0]
    machine_code = sass.compile_kernel(decode_kernel, capability, dtype, M, settings).asm["cubin"]
    text = sass.disassemble(machine_code)
    assert not any(one.multiplies() for one in sass.instructions(text))
    first, *_ = sass.innermost_loops(text)  # the second one is for what is not finite
    # For sm_100 and fp16, ptxas takes 80 of 255 registers, and keeps two sums in memory from step to step.
    spilled = (capability, dtype) == (100, "fp16")
    assert sum(one.spills() for one in first) <= (2 if spilled else 0)
    assert sass.resources(machine_code).stack <= (16 if spilled else 0)
    threads = 32 * settings["num_warps"]
    signs = settings["BLOCK_N"] * settings["BLOCK_W"] * 32 // threads
    additions = sum(one.additions() for one in first)
    # Beside the sums of each row there is that of all activations.
    assert signs * settings["BLOCK_M"] <= additions <= signs * settings["BLOCK_M"] * 1.25
    assert sum(one.name == "LOP3" for one in first) <= 1.25 * signs
    assert not any(one.name in ("FSEL", "SEL") for one in first)
    assert any(one.loads_16_bytes() for one in first)


@pytest.mark.parametrize("capability", sass.TARGETS)
def test_scales_are_met_once_for_each_activation_and_result(capability: int) -> None:
    settings = decode_blocks(1, 4096, 4096)[0]
    machine_code = sass.compile_kernel(decode_kernel, capability, "bf16", 1, settings, scaled=True).asm[
        "cubin"
    ]
    first, *_ = sass.innermost_loops(sass.disassemble(machine_code))
    activations = settings["BLOCK_W"] * 32 // (32 * settings["num_warps"])
    multiplications = [one for one in first if one.multiplies()]
    # At most once for the sums of rows and once for the sum of all.
    assert 0 < len(multiplications) <= 2 * activations
    assert not any(one.multiplies_matrices() for one in multiplications)


@pytest.mark.parametrize("M", [17, 64, 2048])
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_many_tokens_go_through_tensor_cores_without_spills(capability: int, M: int) -> None:
    settings = prefill_blocks(M, 4096, capability)[0]
    compiled = sass.compile_kernel(prefill_kernel, capability, "bf16", M, {**settings, "TERMS": 1})
    machine_code = compiled.asm["cubin"]
    code = sass.instructions(sass.disassemble(machine_code))
    assert any(one.multiplies_matrices() for one in code)
    assert not any(one.spills() for one in code)
    assert sass.resources(machine_code).stack == 0
    assert any(one.loads_16_bytes() for one in code)


def test_signs_go_to_the_tensor_cores_of_hopper_from_registers() -> None:
    settings = prefill_blocks(2048, 4096, 90)[0]
    compiled = sass.compile_kernel(prefill_kernel, 90, "bf16", 2048, {**settings, "TERMS": 1})
    code = sass.instructions(sass.disassemble(compiled.asm["cubin"]))
    products = [one.operands for one in code if one.name == "HGMMA"]
    # The first operand is a register; activations are described by gdesc, in shared memory.
    assert products and all(re.match(r"R\d+, R\d+, gdesc", operands) for operands in products)


@pytest.mark.parametrize(("kernel", "matrix"), [(decode_kernel, False), (prefill_kernel, True)])
def test_compiles_for_an_mi300(kernel: object, matrix: bool) -> None:
    settings = {**prefill_blocks(64, 4096, 80)[0], "TERMS": 1} if matrix else decode_blocks(1, 4096, 4096)[0]
    text = sass.compile_kernel(kernel, "gfx942", "bf16", 64 if matrix else 1, settings).asm["amdgcn"]
    assert bool(re.search(r"v_mfma_f32_\w+", text)) == matrix
    if not matrix:
        assert re.search(r"v_(pk_)?add_f32", text)
        # y + y - total becomes a fused operation, once for each result.
        multiplications = re.findall(r"v_(?:pk_)?(?:mul|fma|mac|fmac)_f32", text)
        assert len(multiplications) <= settings["BLOCK_M"] * settings["BLOCK_N"]


@pytest.mark.parametrize("capability", (80, 90))
def test_a_kernel_that_multiplies_is_seen(capability: int) -> None:
    from support.multiplying_kernel import multiplying_kernel

    blocks = {"BLOCK_M": 1, "BLOCK_N": 1, "BLOCK_W": 4}
    machine_code = sass.compile_kernel(multiplying_kernel, capability, "bf16", 64, blocks).asm["cubin"]
    loops = sass.innermost_loops(sass.disassemble(machine_code))
    assert any(one.multiplies() for loop in loops for one in loop)


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
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", True),
        ("IMMA.16832.S8.S8 R4, R8, R12, R4", True),
        ("FFMA2 R4, R4, R6, R8", True),
        ("DFMA R4, R4, R6, R8", True),
    ],
)
def test_what_counts_as_a_multiplication(line: str, multiplies: bool) -> None:
    code = f".L_x_0:\n        /*0000*/  {line} ;\n        /*0010*/  @P0 BRA `(.L_x_0) ;\n"
    (loop,) = sass.innermost_loops(code)
    assert any(one.multiplies() for one in loop) == multiplies
