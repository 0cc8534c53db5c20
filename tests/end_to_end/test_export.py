"""torch.export of converted models."""

import torch
from support.models.tiny import MLP, OPTIONS, error_of, factored, randn
from torch import nn

from dbf_compile import convert_
from dbf_compile.tables import QuantizedEmbedding


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


@torch.no_grad()
def test_symbolic_trace_takes_layers_as_they_are():
    model, x = factored(MLP()), randn(4, 67)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # asked when it runs
        assert torch.equal(traced(x), model(x))
    tables = convert_(
        nn.Sequential(nn.Embedding(4096, 256), nn.Linear(256, 4096)),
        **OPTIONS,
        embedding="int8",
        head="int8",
    )
    ids = torch.tensor([[1, 5], [7, 4095]])
    assert any(isinstance(module, QuantizedEmbedding) for module in tables.modules())
    assert torch.equal(torch.fx.symbolic_trace(tables)(ids), tables(ids))


def test_layers_take_their_input_by_the_name_that_it_has_in_torch():
    model, x = factored(MLP()), randn(4, 67)
    assert torch.equal(model.up(input=x), model.up(x))
