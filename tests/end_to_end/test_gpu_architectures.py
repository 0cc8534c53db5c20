"""Every kind of model, compiled for a CUDA device that is absent; the generated kernels run in Triton's interpreter."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

from support.cuda.codegen import ARCHITECTURE_TOKENS, NEEDS, generate_all
from support.cuda.interpreter import run_all
from support.models.architectures import BLOCKS, KINDS

pytestmark = [*NEEDS, pytest.mark.slow]


@pytest.fixture(scope="module")
def programs():
    return generate_all("architectures")


@pytest.fixture(scope="module")
def errors(programs):
    return run_all("architectures", programs)


@pytest.mark.parametrize("name", ARCHITECTURE_TOKENS)
def test_every_product_with_signs_is_a_generated_kernel(name, programs):
    program, layers = programs[name], -(-KINDS[name][3] // BLOCKS)  # one block, and what is not in a block
    assert "torch.ops.dbf" not in program.call
    assert program.call.count("triton_tem") == 2 * layers
    templates = [text for kernel, text in program.kernels.items() if kernel.startswith("triton_tem")]
    assert all("decode_tile(" in text or "prefill_tile(" in text for text in templates)


@pytest.mark.parametrize("name", ARCHITECTURE_TOKENS)
def test_it_computes_what_the_eager_model_computes(name, errors):
    assert errors[name] <= 1
