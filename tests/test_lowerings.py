"""The lowerings on a CUDA device that is not there: what Inductor generates, its machine code, and what it computes.

On the CPU every compiled test runs them.
"""

from __future__ import annotations

import re

import pytest
from support import sass
from support.cuda_codegen import CASES, Case, Program, generate_all
from support.cuda_interpreter import run_all

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    sass.missing_tools() is not None, reason=f"cannot compile for NVIDIA: {sass.missing_tools()}"
)

ON_TRITON = [case for case in CASES if case.dtype != "float64"]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return generate_all()


@pytest.fixture(scope="module")
def errors(programs: dict[str, Program]) -> dict[str, float]:
    return run_all(programs)


@pytest.mark.parametrize("case", ON_TRITON, ids=str)
def test_a_layer_is_two_products_with_the_scales_fused_around_them(
    case: Case, programs: dict[str, Program]
) -> None:
    launched = re.findall(r"(\w+)\.run\(", programs[str(case)].call)
    products = [name for name in launched if name.startswith("sign_matmul_kernel")]
    assert len(products) == 2
    assert len(launched) == 5  # scale_in before, scale_mid between, scale_out and bias behind
    assert "torch.ops.dbf" not in programs[str(case)].call


def test_double_precision_goes_to_the_operator(programs: dict[str, Program]) -> None:
    (case,) = set(CASES) - set(ON_TRITON)
    assert programs[str(case)].call.count("torch.ops.dbf.sign_matmul") >= 2
    assert not programs[str(case)].cubins


def test_a_dynamic_batch_is_one_program(programs: dict[str, Program]) -> None:
    (case,) = (case for case in CASES if case.dynamic)
    call = programs[str(case)].call
    (rows,) = set(re.findall(r"^ +(s\d+) = ", call, re.M))
    grids = [
        arguments.split(", ")[6] for arguments in re.findall(r"sign_matmul_kernel_0\.run\((.*), stream", call)
    ]
    assert len(grids) == 2
    assert all(rows in grid for grid in grids)


@pytest.mark.parametrize("case", ON_TRITON, ids=str)
def test_signs_meet_additions_only(case: Case, programs: dict[str, Program]) -> None:
    assert programs[str(case)].cubins
    for cubin in programs[str(case)].cubins.values():
        (loop,) = sass.innermost_loops(sass.disassemble(bytes.fromhex(cubin)))
        assert not loop.multiplications()
        assert loop.additions()
        assert not loop.spills()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_generated_program_computes_the_layer(case: Case, errors: dict[str, float]) -> None:
    assert errors[str(case)] <= 1
