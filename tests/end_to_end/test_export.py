"""torch.export of converted models."""

import torch
from support.models.tiny import MLP, error_of, factored, randn


def test_a_converted_model_exports_with_a_dynamic_batch(tmp_path):
    model = factored(MLP())
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (randn(4, 67),), dynamic_shapes=({0: batch},))
    products = [node for node in program.graph.nodes if node.target is torch.ops.dbf.sign_matmul.default]
    assert len(products) == 4
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (2, 9):
        x = randn(rows, 67, seed=rows)
        # The same operators in the same order; 1e-6 allows for a fused multiply-add.
        assert error_of(loaded(x), model(x)) < 1e-6


def test_an_exported_model_compiles_with_the_backend():
    model, x = factored(MLP()), randn(4, 67)
    module = torch.export.export(model, (x,)).module()
    # float32 sums of at most 200 products in the order of another kernel.
    assert error_of(torch.compile(module, backend="dbf")(x), model(x)) < 2e-5
