"""Every kind of model, tiny and random: compressed, saved, loaded, compiled, compared."""

import pytest
import torch
from support.models.architectures import KINDS, batches, random_model
from support.models.tiny import error_of, factored

import dbf_compile
from dbf_compile.linear import DoubleBinaryLinear

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

# test_transformers.py compiles Llama, GPT-2 and BERT, test_gpu_architectures.py all without experts, for a GPU. Of these,
# here are those that have what a Llama has not: norms of queries and keys, and windows; pictures; two stacks.
COMPILED = ("gemma3", "vit", "whisper")
EXPERTS = ("mixtral", "gpt_oss")  # Qwen's are compiled as Mixtral's
# Their layers are lowered as those of the others; what is their own is in the graph.
UNLOWERED = ("whisper", "gpt_oss")
TOLERANCE = 1e-4  # float32 sums in another order


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_compressed_and_loaded(name, tmp_path):
    *_, layers, mode = KINDS[name]
    dense = random_model(name)
    dense.save_pretrained(tmp_path / "dense")
    calibration = list(batches(name))
    options = {"bits": 4.0, "iterations": 20, "tune": 1, "refine": 1, "distill": 1, "progress": False}
    compressed = dbf_compile.compress(
        tmp_path / "dense", tmp_path / "compressed", batches=calibration, mode=mode, **options
    )
    assert compressed.report["coverage"]["share"] > 0.6
    model, info = type(dense).from_pretrained(compressed.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(isinstance(layer, DoubleBinaryLinear) for layer in model.modules()) == layers
    exact, eager = (run(**calibration[0]).logits for run in (dense, model))
    # The error of a constant would be 1.
    assert (eager - exact).norm() < 0.5 * (exact - exact.mean()).norm()


@torch.no_grad()
def error_of_compiled(model, batch):
    eager = model(**batch).logits
    return error_of(torch.compile(model, backend="dbf")(**batch).logits, eager)


@pytest.fixture
def lowered(request, name):
    """Leave those of ``UNLOWERED`` to be run node by node."""
    if name in UNLOWERED:
        request.getfixturevalue("unlowered")


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", COMPILED)
def test_it_is_compiled(name):
    model = factored(random_model(name, blocks=1).requires_grad_(False))
    assert error_of_compiled(model, next(batches(name))) < TOLERANCE


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_are_compressed_generate_and_are_compiled(name, tmp_path):
    dense = random_model(name, blocks=1)
    dense.save_pretrained(tmp_path / "dense")
    options = {"bits": 4.0, "iterations": 3, "own_text": 0, "distill": 0, "progress": False}
    compressed = dbf_compile.compress(tmp_path / "dense", tmp_path / "compressed", **options)
    model = type(dense).from_pretrained(compressed.folder)
    batch = next(batches(name))
    tokens = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 29)
    assert error_of_compiled(model, batch) < TOLERANCE
