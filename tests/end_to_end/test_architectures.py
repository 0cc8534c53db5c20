"""Every kind of model: from a tiny random configuration, compressed, saved, loaded, compiled, compared."""

import pytest
import torch
from support.models.architectures import KINDS, batches, random_model
from support.models.tiny import error_of

import dbf_compile
from dbf_compile.linear import DoubleBinaryLinear

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_compressed_loaded_and_compiled(name, tmp_path):
    *_, layers, mode = KINDS[name]
    dense = random_model(name)
    dense.save_pretrained(tmp_path / "dense")
    given = list(batches(name))
    options = {"bits": 4.0, "iterations": 20, "tune": 1, "refine": 1, "distill": 1, "progress": False}
    made = dbf_compile.compress(tmp_path / "dense", tmp_path / "made", batches=given, mode=mode, **options)
    assert made.report["coverage"]["share"] > 0.6
    model, info = type(dense).from_pretrained(made.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(isinstance(layer, DoubleBinaryLinear) for layer in model.modules()) == layers
    wanted, found = dense(**given[0]).logits, model(**given[0]).logits
    # Nearer to the dense model than a model that knows nothing: 1 would be the error of zeros.
    assert (found - wanted).norm() < 0.5 * (wanted - wanted.mean()).norm()
    compiled = torch.compile(model, backend="dbf")(**given[0]).logits
    assert error_of(compiled, found) < 1e-4  # float32 sums in another order


def test_experts_that_are_compressed_generate(tmp_path):
    dense = random_model("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    made = dbf_compile.compress(
        tmp_path / "dense", tmp_path / "made", bits=4.0, iterations=3, progress=False, distill=0
    )
    model = type(dense).from_pretrained(made.folder)
    tokens = model.generate(next(batches("mixtral"))["input_ids"], max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 29)
