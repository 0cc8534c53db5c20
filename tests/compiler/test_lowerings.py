"""The lowerings on a pretended CUDA device: the generated programs, their machine code, and what they compute.

Every compiled test runs the lowerings of the CPU.
"""

from __future__ import annotations

import re

import pytest
from support.cuda import sass

pytest.importorskip("triton")

from support.cuda import codegen
from support.cuda.codegen import (
    BLOCK_TOKENS,
    CASES,
    DEEP_TOKENS,
    LLAMA_TOKENS,
    SIBLING_TOKENS,
    TUNED,
    Case,
    Program,
    generate_all,
)
from support.cuda.interpreter import run_all

pytestmark = [*codegen.NEEDS, pytest.mark.slow]

ON_TRITON = [case for case in CASES if case.dtype != "float64" and not case.dynamic]
FEW = [case for case in ON_TRITON if case.M <= 16]
DENSE = [case for case in ON_TRITON if case.M > 128 and case.dtype != "float32"]
MANY = [case for case in ON_TRITON if case.M > 16 and case not in DENSE]
ON_OPERATOR = [case for case in CASES if case not in ON_TRITON]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return generate_all("layers")


@pytest.fixture(scope="module")
def errors(programs: dict[str, Program]) -> dict[str, float]:
    return run_all("layers", programs)


def launches(program: Program) -> list[str]:
    return re.findall(r"(\w+)\.run\(", program.call)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_layer_of_few_tokens_is_two_launches(case: Case, programs: dict[str, Program]) -> None:
    program = programs[str(case)]
    assert [name.rpartition("_")[0] for name in launches(program)] == ["triton_tem_fused_sign_matmul"] * 2
    assert all("decode_tile" in source for source in program.kernels.values())
    assert "torch.ops.dbf" not in program.call


@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_tokens_go_to_tensor_cores(case: Case, programs: dict[str, Program]) -> None:
    program = programs[str(case)]
    kinds = [name.split("_")[1] for name in launches(program)]
    # The kernel before applies scale_in; a float32 model also splits its activations before each product.
    assert kinds == (["poi", "tem"] * 2 if case.dtype == "float32" else ["poi", "tem", "tem"])
    products = [source for source in program.kernels.values() if "prefill_tile" in source]
    operands = 3 if case.dtype == "float32" else 1
    assert all(f"OPERANDS : tl.constexpr = {operands}" in source for source in products)
    assert len(products) == 2


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_very_many_tokens_share_a_dense_matrix(case: Case, programs: dict[str, Program]) -> None:
    """Signs are dequantized with their scale, the library multiplies, and results between the products have 16 bits."""
    program = programs[str(case)]
    steps = re.findall(r"(triton_poi|triton_tem)\w+\.run|extern_kernels\.(mm)", program.call)
    # scale_in before the products, two matrices with their scales, the bias after.
    assert [mm or kind for kind, mm in steps].count("mm") == 2
    assert [kind for kind, _ in steps].count("triton_tem") == 2
    assert len(steps) <= 6
    assert "float32" not in program.call
    for cubin in program.cubins.values():
        code = sass.instructions(sass.disassemble(bytes.fromhex(cubin)))
        if case.K % 8 == 0:
            assert {one.opcode for one in code if one.name == "STG"} == {"STG.E.128"}


def test_results_of_all_dtypes_use_a_dense_matrix_and_words_row_by_row_the_operator(
    programs: dict[str, Program], errors: dict[str, float]
) -> None:
    program = programs["plain"]
    assert (
        sum("dequantize_tile" in source for source in program.kernels.values()) == 2
    )  # with and without scale
    assert program.call.count("extern_kernels.mm(") == 1
    assert program.call.count("extern_kernels.mm_dtype(") == 4  # float32 sums
    assert program.call.count("torch.ops.dbf.sign_matmul.default(") == 1
    assert errors["plain"] <= 1


@pytest.mark.parametrize("case", ON_OPERATOR, ids=str)
def test_double_precision_and_dynamic_batches_go_to_the_operator(
    case: Case, programs: dict[str, Program]
) -> None:
    """The operator chooses the kernel at the call: other batches do not compile again."""
    program = programs[str(case)]
    assert program.call.count("torch.ops.dbf.sign_matmul.default(") == 2
    assert not program.cubins


def test_cuda_graphs_copy_nothing_but_activations(
    programs: dict[str, Program],
) -> None:
    """No operation runs on the host, and weights and caches are not copied."""
    obstacles = {name: program.obstacle for name, program in programs.items() if program.obstacle}
    assert obstacles == {"overwritten": "index_put"}  # an operation of the model
    # The tokens of a Llama, and their positions.
    copied = {name: len(program.copied) for name, program in programs.items()}
    assert copied == {name: 2 if "llama" in name else 1 for name in programs}


@pytest.mark.parametrize("M", BLOCK_TOKENS)
def test_norm_activation_and_residual_cost_no_launch_beside_the_norm(
    M: int, programs: dict[str, Program]
) -> None:
    program = programs[f"block of {M}"]
    kinds = [name.split("_")[1] for name in launches(program)]
    assert kinds == ["per", *["tem"] * 6]
    last = program.kernels[launches(program)[-1]]
    x = re.search(r"triton_per\w+\.run\((\w+),", program.call)
    assert x is not None
    assert x[1] in program.call.split(launches(program)[-1])[1].split("stream")[0], (
        "the residual is read in the epilogue"
    )
    assert "decode_tile" in last or "prefill_tile" in last


@pytest.mark.parametrize("M", SIBLING_TOKENS)
def test_layers_factored_as_one_are_two_launches_for_few_tokens(M: int, programs: dict[str, Program]) -> None:
    program = programs[f"siblings of {M}"]
    kinds = [name.split("_")[1] for name in launches(program)]
    # Scales, the cast and the concatenation that this model ends in are one kernel behind.
    assert kinds == (["tem", "tem", "poi"] if M <= 16 else ["poi", *["tem"] * 4, "poi"])


def test_inductor_may_combine_what_reads_a_product(
    programs: dict[str, Program], errors: dict[str, float]
) -> None:
    assert [name.split("_")[1] for name in launches(programs["apart"])] == ["tem", "tem", "poi"]
    assert errors["apart"] <= 1


def test_a_token_of_a_llama_costs_no_launch_beside_its_products_that_it_does_not_cost_dense(
    programs: dict[str, Program],
) -> None:
    pytest.importorskip("transformers")
    dense, factored, combined = (programs[name] for name in ("dense llama", "llama of 1", "combined llama"))
    products = [name for name in launches(factored) if "_tem_" in name]
    # Both stages of q, k and v, of o, of gate and up, of down.
    assert len(products) == 8
    # The head stays dense, as what a model multiplies beside its layers.
    dense_mm, factored_mm = (program.call.count("extern_kernels.mm(") for program in (dense, factored))
    assert dense_mm - factored_mm == 7
    assert len(launches(factored)) - len(products) == len(launches(dense))
    assert len(launches(combined)) < len(launches(factored))


@pytest.mark.parametrize("M", LLAMA_TOKENS)
def test_the_generated_program_computes_a_llama(M: int, errors: dict[str, float]) -> None:
    """Of transformers, with a static cache: its logits, and the keys and values that it leaves."""
    pytest.importorskip("transformers")
    assert errors[f"llama of {M}"] <= 1


@pytest.mark.parametrize("M", SIBLING_TOKENS)
def test_the_generated_program_computes_siblings(M: int, errors: dict[str, float]) -> None:
    assert errors[f"siblings of {M}"] <= 1


def constant(program: Program, kernel: str, name: str) -> int:
    match = re.search(rf"\b{name} : tl.constexpr = (\d+)", program.kernels[kernel])
    assert match is not None
    return int(match[1])


def test_the_reader_adds_the_partial_sums_of_one_token(programs: dict[str, Program]) -> None:
    """Split-K: the kernel of the next product adds the partial sums, or that of an activation between them."""
    program = programs["deep of 1"]
    assert [name.split("_")[1] for name in launches(program)] == ["tem", "tem", "poi", "tem", "tem"]
    products = [name for name in launches(program) if "_tem_" in name]
    # 2100, 1090, 1060 and 40 columns are 66, 35, 34 and 2 words; a result of the graph has no partial sums.
    assert [constant(program, name, "SPLIT_K") for name in products] == [3, 2, 2, 1]
    assert [constant(program, name, "X_SPLIT_K") for name in products] == [1, 3, 1, 2]


def test_an_activation_between_two_layers_stays_part_of_the_first_ones_kernel(
    programs: dict[str, Program],
) -> None:
    program = programs["chain"]
    assert [name.split("_")[1] for name in launches(program)] == ["tem"] * 4
    assert [constant(program, name, "SPLIT_K") for name in launches(program)] == [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("name", "rows"), [("deep of 1", (1090, 1060, 40, 70)), ("chain", (1090, 1060, 40, 70))]
)
def test_there_is_one_program_for_each_tile_of_each_split(
    name: str, rows: tuple[int, ...], programs: dict[str, Program]
) -> None:
    program = programs[name]
    products = [kernel for kernel in launches(program) if "_tem_" in kernel]
    for kernel, N in zip(products, rows, strict=True):
        grid = re.search(rf"{kernel}\.run\(.*?, (\d+), 1, 1, stream", program.call)
        assert grid is not None
        tiles = -(-N // constant(program, kernel, "BLOCK_N"))
        assert int(grid[1]) == tiles * constant(program, kernel, "SPLIT_K")


def test_a_write_to_a_sum_ends_its_split_k(programs: dict[str, Program], errors: dict[str, float]) -> None:
    program = programs["overwritten"]
    first, *_, second = [name for name in launches(program) if "_tem_" in name]
    assert (constant(program, first, "SPLIT_K"), constant(program, second, "X_SPLIT_K")) == (3, 1)
    assert errors["overwritten"] <= 1


@pytest.mark.parametrize("name", [*map(str, TUNED), "deep of 1"])
def test_what_tuning_chooses_is_generated_and_computes_the_same(
    name: str, programs: dict[str, Program], errors: dict[str, float]
) -> None:
    tuned, default = programs[f"tuned {name}"], programs[name]
    ours = [[one for one in launches(program) if "_tem_" in one] for program in (tuned, default)]
    assert len(ours[0]) == len(ours[1]) >= 2
    settings = [
        [
            re.findall(
                r"(BLOCK_\w) : tl.constexpr = (\d+)|(num_(?:warps|stages))=(\d+)", program.kernels[one]
            )
            for one in every
        ]
        for program, every in zip((tuned, default), ours, strict=True)
    ]
    assert all(one != other for one, other in zip(*settings, strict=True))
    assert errors[f"tuned {name}"] <= 1


def test_several_tokens_use_no_split_k(programs: dict[str, Program]) -> None:
    program = programs["deep of 3"]
    assert [name.split("_")[1] for name in launches(program)] == ["tem"] * 4
    assert {constant(program, name, "SPLIT_K") for name in launches(program)} == {1}


@pytest.mark.parametrize("M", DEEP_TOKENS)
def test_the_generated_program_computes_deep_layers(M: int, errors: dict[str, float]) -> None:
    assert errors[f"deep of {M}"] <= 1


@pytest.mark.parametrize("case", FEW, ids=str)
def test_signs_of_few_tokens_meet_additions_only(case: Case, programs: dict[str, Program]) -> None:
    assert programs[str(case)].cubins
    for cubin in programs[str(case)].cubins.values():
        machine_code = bytes.fromhex(cubin)
        code = sass.instructions(sass.disassemble(machine_code))
        scales = [one for one in code if one.multiplies()]
        # in_scale multiplies activations, four for each load of such, and by triton 3.6 also with the other sign;
        # out_scale and the cast make each result.
        assert len(scales) <= 8 * sum(one.name == "LDG" for one in code) / 2 + 4
        assert sum(one.name == "LDS" for one in code) >= 8 and sum(one.additions() for one in code) >= 16
        assert not any(one.multiplies_matrices() for one in scales)
        assert sass.resources(machine_code).stack == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_generated_program_computes_the_layer(case: Case, errors: dict[str, float]) -> None:
    assert errors[str(case)] <= 1
