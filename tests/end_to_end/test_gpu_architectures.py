"""Every kind of model on a CUDA device that is not there: what Inductor generates is computed in Triton's interpreter."""

import shutil

import pytest
from support import sass
from support.architectures import KINDS
from support.cuda_codegen import ARCHITECTURE_TOKENS, generate_all
from support.cuda_interpreter import run_all

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(
        sass.missing_tools() is not None, reason=f"cannot compile for NVIDIA: {sass.missing_tools()}"
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def programs():
    return generate_all("architectures")


@pytest.fixture(scope="module")
def errors(programs):
    return run_all("architectures", programs)


@pytest.mark.parametrize("name", ARCHITECTURE_TOKENS)
def test_every_product_with_signs_is_a_generated_kernel(name, programs):
    layers = KINDS[name][3]
    products = [source for source in programs[name].kernels.values() if "triton_tem" in source]
    assert "torch.ops.dbf" not in programs[name].call
    assert products and programs[name].call.count("triton_tem") == 2 * layers


@pytest.mark.parametrize("name", ARCHITECTURE_TOKENS)
def test_it_computes_what_the_eager_model_computes(name, errors):
    assert errors[name] <= 1
