"""Programs: inputs are looked up by path, those of prepared layers are made of others, and files of another torch are no programs."""

import pytest
import torch
from support.models.tiny import factored, tiny_llama

from dbf_compile.compiler import programs


def doubled(x, parts):
    return (x * 2 + parts[0],)


@pytest.mark.slow
def test_a_program_is_kept_and_takes_other_sizes(tmp_path):
    file = tmp_path / "programs" / "doubled.bin"
    arguments = {"x": torch.ones(7, 3), "parts": [torch.ones(3)]}
    program = programs.compile_program(doubled, arguments, {"x": [0]}, file)
    loaded = programs.load_program(file)
    assert loaded is not None and loaded.paths == program.paths
    for item in (program, loaded):
        other = {"x": torch.full((5, 3), 2.0), "parts": [torch.arange(3.0)]}
        (y,) = item.function(*item.inputs(other))
        assert torch.equal(y, doubled(**other)[0])
    assert program.places("x") and not program.places("parts")


def rows_of_heads(cache, index):
    return (cache[0].index_copy_(2, index, torch.ones(*cache[0].shape[:2], 1, cache[0].shape[3])).sum(1) * 2,)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [3, 5])
def test_a_size_that_equals_another_in_the_example_is_another(heads):
    def arguments(rows, length):
        return {
            "cache": [torch.arange(rows * heads * length * 4.0).view(rows, heads, length, 4)],
            "index": torch.tensor([1]),
        }

    program = programs.compile_program(rows_of_heads, arguments(3, 4), {"cache": [0, 2]}, None)
    for rows, length in ((3, 4), (8, 6), (2, 33)):
        (y,) = program.function(*program.inputs(arguments(rows, length)))
        assert torch.equal(y, rows_of_heads(**arguments(rows, length))[0])


def halved_where_long(x):
    return (x / 2 if x.shape[0] > 4 else x,)


def of_seven(x):
    return (x + torch.ones(7, 1),)


@pytest.mark.parametrize("function", [halved_where_long, of_seven])
def test_a_program_of_one_size_alone_is_refused(function):
    with pytest.raises(Exception, match="sizes that may change"):
        programs.compile_program(function, {"x": torch.ones(7, 3)}, {"x": [0]}, None)


def test_inputs_of_prepared_layers_are_made_of_their_tensors():
    layer = factored(tiny_llama(layers=1)).model.layers[0].mlp.down_proj
    names = ("signs_in", "signs_out", "scale_in", "scale_mid", "scale_out")
    factors = " ".join(f"L['model']._parameters['{name}']" for name in names)
    program = programs.Program(lambda: None, [f"prepared {factors}||True", "L['x'].size()[1]"])
    prepared, size = program.inputs({"model": layer, "x": torch.ones(2, 9)})
    assert size == 9
    x = torch.randn(1, 3, layer.in_features)
    y = torch.ops.dbf.prepared_layers(x, prepared, layer.out_features, torch.float32)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("content", [None, b"", b"L['x']\0not a program"])
def test_what_is_no_program_of_this_torch_is_none(tmp_path, content):
    file = tmp_path / "program.bin"
    if content is not None:
        file.write_bytes(content)
    assert programs.load_program(file) is None
