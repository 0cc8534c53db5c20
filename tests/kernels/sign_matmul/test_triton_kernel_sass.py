"""What the Triton kernels become for each architecture, read from their machine code; no GPU is needed."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Iterable, Iterator

import pytest
from support.cuda import sass

pytest.importorskip("triton")

import triton

from dbf_compile.kernels.sign_matmul import triton_prefill
from dbf_compile.kernels.sign_matmul.triton_decode import decode_blocks, decode_kernel
from dbf_compile.kernels.sign_matmul.triton_dequantize import dequantize_blocks, dequantize_kernel
from dbf_compile.kernels.sign_matmul.triton_prefill import prefill_blocks, prefill_kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sass.missing_tools() is not None, reason=f"cannot compile for NVIDIA: {sass.missing_tools()}"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and compiles nothing"
    ),
]

# An older one computes some sums of four with both signs.
counted_with_newer_triton = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7), reason="counts are those of triton 3.9"
)


@counted_with_newer_triton
@pytest.mark.parametrize(
    ("M", "dtype", "parts"),
    [(1, "fp32", 1), (1, "bf16", 1), (1, "fp16", 1), (16, "bf16", 1), (1, "fp32", 4)],
)
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_few_tokens_cost_a_look_up_and_an_addition_for_four_signs(
    capability: int, dtype: str, M: int, parts: int
) -> None:
    settings = decode_blocks(M, 4096, 4096, parts)[0]
    machine_code = sass.compile_kernel(decode_kernel, capability, dtype, M, settings).asm["cubin"]
    code = sass.instructions(sass.disassemble(machine_code))
    assert not any(one.multiplies() for one in code)
    assert not any(one.spills() for one in code)
    assert sass.resources(machine_code).stack == 0
    # Four activations at once; words of 16 rows lie side by side, 4 bytes for each thread.
    assert any(one.loads_16_bytes() for one in code) == (dtype == "fp32")
    threads = 32 * settings["num_warps"]
    numbers = settings["BLOCK_N"] * settings["BLOCK_W"] * 8 // threads
    lookups = numbers * settings["BLOCK_M"]
    entries = settings["BLOCK_M"] * settings["BLOCK_W"] * 128 // threads
    # Beside the look-ups there is the exchange of sums between threads.
    assert lookups <= sum(one.name == "LDS" for one in code) <= lookups + 16
    # Nine additions and subtractions make four entries.
    assert lookups <= sum(one.additions() for one in code) <= lookups + 9 * entries / 4 + 16
    # Shift and mask are shared by the tokens.
    bit_operations = sum(one.name in ("LOP3", "SHF") for one in code)
    assert bit_operations <= 2 * numbers + (24 if M == 1 else 128)


@pytest.mark.parametrize("tile", [(1, 64, 32, 8), (1, 32, 64, 16), (4, 64, 32, 8)], ids=str)
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_every_thread_loads_the_words_that_it_looks_up(capability: int, tile: tuple[int, ...]) -> None:
    settings = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_W", "num_warps"), tile, strict=True))
    settings |= {"SPLIT_K": 1, "K": 11008}
    machine_code = sass.compile_kernel(decode_kernel, capability, "fp32", tile[0], settings).asm["cubin"]
    (loop,) = [loop for loop in sass.innermost_loops(sass.disassemble(machine_code)) if len(loop) > 30]
    names = collections.Counter(one.name for one in loop)
    words = tile[1] * tile[2] // (32 * tile[3])
    # Nothing else is read from shared memory; barriers are those before and behind the filling of the tables.
    assert names["LDS"] == 8 * words * tile[0]
    assert names["BAR"] == 2
    assert not names["SHFL"]


@counted_with_newer_triton
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_scales_are_met_once_for_each_activation_and_result(capability: int) -> None:
    settings = decode_blocks(1, 4096, 4096)[0]
    machine_code = sass.compile_kernel(decode_kernel, capability, "bf16", 1, settings, scaled=True).asm[
        "cubin"
    ]
    code = sass.instructions(sass.disassemble(machine_code))
    # Each thread fills a quarter of a table from all its four activations; x₀s₀ + x₁s₁ and x₀s₀ - x₁s₁ become fused
    # operations on one product, three multiplications for two activations.
    activations = settings["BLOCK_W"] * 32 * 4 // (32 * settings["num_warps"])
    multiplications = [one for one in code if one.multiplies()]
    assert 0 < len(multiplications) <= 1.5 * activations + 4
    assert not any(one.multiplies_matrices() for one in multiplications)


@pytest.mark.parametrize(
    "settings", [one for one in prefill_blocks(2048, 4096) if one["num_stages"] == 3], ids=str
)
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_signs_take_the_shortest_way_to_tensor_cores(capability: int, settings: dict[str, int]) -> None:
    machine_code = sass.compile_kernel(
        prefill_kernel, capability, "bf16", 2048, {**settings, "OPERANDS": 1}
    ).asm["cubin"]
    text = sass.disassemble(machine_code)
    assert not any(one.spills() for one in sass.instructions(text))
    assert sass.resources(machine_code).stack == 0
    (loop,) = [loop for loop in sass.innermost_loops(text) if any(one.multiplies_matrices() for one in loop)]
    assert any(one.loads_16_bytes() for one in loop)
    names = collections.Counter(one.name for one in loop)
    assert names["SHFL"] <= 1  # the number of the warp
    if capability == 90:
        # prefill_blocks chooses a tile by these cycles.
        tile = (*(settings[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")), settings["num_warps"])
        cycles = len(loop) * 128 / settings["BLOCK_K"] * settings["num_warps"] / 4
        assert cycles == pytest.approx(triton_prefill._TILES[tile][0], rel=0.05)
    signs = settings["BLOCK_N"] * settings["BLOCK_K"]
    if names["HMMA"]:
        # Every thread expands the signs that it multiplies by, and no product is computed twice: 16 x 8 x 16 in each.
        assert not names["STS"]
        assert names["BAR"] <= 2
        assert names["HMMA"] * settings["num_warps"] * 16 * 8 * 16 == settings["BLOCK_M"] * signs
    else:
        # Expanded signs are stored once, 16 bytes at a time, and tensor cores are waited for once a step.
        assert capability in (90, 100) and settings["BLOCK_M"] >= 64
        assert names["STS"] == signs * 2 // (16 * 32 * settings["num_warps"])
        assert names["BAR"] <= 3
        assert sum("DEPBAR" in one.opcode and "gsb" in one.operands for one in loop) <= 1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("capability", sass.TARGETS)
def test_signs_are_written_out_16_bytes_at_a_time(capability: int, scaled: bool) -> None:
    settings = dequantize_blocks(4096)[0]
    machine_code = sass.compile_kernel(dequantize_kernel, capability, "bf16", 200, settings, scaled).asm[
        "cubin"
    ]
    code = sass.instructions(sass.disassemble(machine_code))
    assert not any(one.spills() or one.multiplies() for one in code)
    numbers = settings["BLOCK_N"] * settings["BLOCK_K"] // (32 * settings["num_warps"])
    stores = [one for one in code if one.name == "STG"]
    assert len(stores) == numbers // 8
    assert all(".128" in one.opcode for one in stores)
    # A thread reads whole words; they change threads once, before they are expanded.
    assert sum(one.name == "LDG" and ".U16" not in one.opcode for one in code) == numbers // 32
    assert sum(one.name == "BAR" for one in code) == 1
    assert sum(one.name == "LDS" for one in code) <= numbers // 32


SIZES = [64 * 2**power for power in range(10)]


def distinct(every: Iterable[dict[str, int]]) -> list[dict[str, int]]:
    return [dict(items) for items in dict.fromkeys(tuple(one.items()) for one in every)]


def every_default(kernel: object) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield numbers of tokens and the settings that some sizes have without tuning."""
    if kernel is dequantize_kernel:
        yield from ((512, dequantize_blocks(K)[0]) for K in SIZES)
    elif kernel is decode_kernel:
        for M in (1, 4, 16):
            settings = (decode_blocks(M, N, K, parts)[0] for N in SIZES for K in SIZES for parts in (1, 4))
            yield from ((M, one) for one in distinct(settings))
    else:
        for terms in (1, 3):
            settings = (prefill_blocks(M, N, terms)[0] for M in (17, *SIZES) for N in SIZES)
            yield from ((512, {**one, "OPERANDS": terms}) for one in distinct(settings))


# Without and with instructions for groups of warps, and AMD's; those that have the least.
@pytest.mark.parametrize("target", [86, 90, "gfx942"])
@pytest.mark.parametrize("kernel", [decode_kernel, prefill_kernel, dequantize_kernel])
def test_without_tuning_no_kernel_wants_more_shared_memory_than_there_is(
    kernel: object, target: int | str
) -> None:
    for M, settings in every_default(kernel):
        used = sass.compile_kernel(kernel, target, "bf16", M, settings).metadata.shared
        assert used <= sass.SHARED_MEMORY[target], settings


@pytest.mark.parametrize(("kernel", "matrix"), [(decode_kernel, False), (prefill_kernel, True)])
def test_compiles_for_an_mi300(kernel: object, matrix: bool) -> None:
    settings = {**prefill_blocks(64, 4096)[0], "OPERANDS": 1} if matrix else decode_blocks(1, 4096, 4096)[0]
    text = sass.compile_kernel(kernel, "gfx942", "bf16", 64 if matrix else 1, settings).asm["amdgcn"]
    assert bool(re.search(r"v_mfma_f32_\w+", text)) == matrix
    if not matrix:
        assert re.search(r"v_(pk_)?add_f32", text)
        assert re.search(r"ds_read\w*_b32", text)
        assert not re.search(r"v_(?:pk_)?(?:mul|fma|mac|fmac)_f32", text)


def test_signs_are_written_out_for_an_mi300() -> None:
    settings = dequantize_blocks(4096)[0]
    text = sass.compile_kernel(dequantize_kernel, "gfx942", "bf16", 200, settings, scaled=True).asm["amdgcn"]
    assert re.search(r"(global|buffer)_store_dwordx4", text)


@pytest.mark.parametrize("capability", (80, 90))
def test_a_kernel_that_multiplies_is_seen(capability: int) -> None:
    from support.cuda.multiplying_kernel import multiplying_kernel

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
