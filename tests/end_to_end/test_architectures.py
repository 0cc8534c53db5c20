"""Every kind of model, tiny and random: compressed, saved, loaded, compiled, compared."""

import pytest
import torch
from support.models.architectures import KINDS, batches, random_model
from support.models.tiny import error_of

import dbf_compile
from dbf_compile.linear import DoubleBinaryLinear

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

# test_transformers.py compiles the first ones; Mistral is a Llama at this size. test_gpu_architectures.py has the next
# three through the same passes, and runs them. Qwen's experts are compiled as Mixtral's.
COMPILED_ELSEWHERE = ("llama", "gpt2", "bert", "mistral", "phi", "phi3", "opt", "qwen3_moe")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_compressed_loaded_and_compiled(name, tmp_path):
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
    if name not in COMPILED_ELSEWHERE:
        compiled = torch.compile(model, backend="dbf")(**calibration[0]).logits
        assert error_of(compiled, eager) < 1e-4  # float32 sums in another order


def test_experts_that_are_compressed_generate(tmp_path):
    dense = random_model("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    compressed = dbf_compile.compress(
        tmp_path / "dense",
        tmp_path / "compressed",
        bits=4.0,
        iterations=3,
        own_text=0,
        progress=False,
        distill=0,
    )
    model = type(dense).from_pretrained(compressed.folder)
    tokens = model.generate(next(batches("mixtral"))["input_ids"], max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 29)
