"""Programs: inputs are looked up by path, those of prepared layers are made of others, and damaged files are no programs."""

import pytest
import torch
from support.models.tiny import factored, tiny_llama

from dbf_compile.compiler import programs


def test_inputs_of_prepared_layers_are_made_of_their_tensors():
    layer = factored(tiny_llama(layers=1)).model.layers[0].mlp.down_proj
    names = ("signs_in", "signs_out", "scale_in", "scale_mid", "scale_out")
    factors = " ".join(f"L['model']._parameters['{name}']" for name in names)
    program = programs.Program(lambda: None, [f"prepared {factors}||True", "L['parts'][1]"])
    parts = [torch.ones(1), torch.ones(2)]
    prepared, part = program.inputs({"model": layer, "parts": parts})
    assert part is parts[1]
    x = torch.randn(1, 3, layer.in_features)
    y = torch.ops.dbf.prepared_layers(x, prepared, layer.out_features, torch.float32)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize(
    "files",
    [
        None,
        {},
        {"inputs.json": b"{"},
        {"inputs.json": b"{}", "program.so": b"not a library"},
        {"inputs.json": b'{"paths": [], "sha256": {"program.so": "0"}}', "program.so": b"not a library"},
        {"inputs.json": b'{"paths": [], "sha256": {"program.so": "0"}}'},
    ],
)
def test_what_is_no_program_is_none(tmp_path, files):
    folder = tmp_path / "program"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    assert programs.load_program(folder) is None
