"""Programs compute what their functions do, at any sizes that may change, and are kept; other functions are refused."""

import shutil

import pytest
import torch
from support.strategies import random_factors

from dbf_compile.compiler import ahead_of_time, programs
from dbf_compile.compiler.ahead_of_time import compile_program
from dbf_compile.kernels.cached_attention import cpu_kernel as attention_kernel
from dbf_compile.kernels.row_matmul import cpu_kernel as row_kernel
from dbf_compile.kernels.sign_matmul import cpu_kernel


def doubled(x, parts):
    return (x * 2 + parts[0],)


@pytest.mark.slow
def test_a_program_is_kept_and_takes_other_sizes(tmp_path):
    folder = tmp_path / "programs" / "doubled"
    arguments = {"x": torch.ones(7, 3), "parts": [torch.ones(3)]}
    program = compile_program(doubled, arguments, {"x": [0]}, folder)
    loaded = programs.load_program(folder)
    assert loaded is not None and loaded.paths == program.paths
    for item in (program, loaded):
        other = {"x": torch.full((5, 3), 2.0), "parts": [torch.arange(3.0)]}
        (y,) = item.function(item.inputs(other))
        assert torch.equal(y, doubled(**other)[0])
    assert program.places("x") and not program.places("parts")
    assert [path.name for path in folder.parent.iterdir()] == ["doubled"]  # nothing half-written is left
    library = folder / "program.so"
    kept = library.stat().st_ino
    for damage in (None, b"damaged"):
        other = shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        if damage is not None:
            library.unlink()  # it is loaded here: to write into it would end this process
            library.write_bytes(damage)
        ahead_of_time._rename(other, folder)
        assert programs.load_program(folder) is not None
        assert (library.stat().st_ino == kept) is (
            damage is None
        )  # another process may have loaded a sound one


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "by_dispatcher"), [(torch.float64, True), (torch.float32, False)])
def test_operators_are_called_as_c_functions_or_by_the_dispatcher(tmp_path, dtype, by_dispatcher):
    factors = random_factors(24, 40, 50)

    def applied(x, parts):
        return (torch.ops.dbf.sign_matmul(x * 2, *parts),)

    # An optional tensor that is there, and others that are not.
    parts = [factors.signs_in, factors.scale_in.to(dtype)]
    folder = tmp_path / "applied"
    compile_program(applied, {"x": torch.ones(7, 24, dtype=dtype), "parts": parts}, {"x": [0]}, folder)
    loaded = programs.load_program(folder)
    assert loaded is not None
    assert (folder / "program.json").exists() is by_dispatcher
    x = torch.randn(3, 24, dtype=dtype)
    (y,) = loaded.function(loaded.inputs({"x": x, "parts": parts}))
    assert torch.equal(y, torch.ops.dbf.sign_matmul(x * 2, *parts))
    if by_dispatcher:
        (folder / "program.json").rename(tmp_path / "operators")
        assert programs.load_program(folder) is None


def rows_of_heads(cache, index):
    return (cache[0].index_copy_(2, index, torch.ones(*cache[0].shape[:2], 1, cache[0].shape[3])).sum(1) * 2,)


@pytest.mark.slow
def test_a_size_that_equals_another_in_the_example_is_another(tmp_path):
    heads = 3
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "program"  # where nothing can be written

    def arguments(rows, length):
        return {
            "cache": [torch.arange(rows * heads * length * 4.0).view(rows, heads, length, 4)],
            "index": torch.tensor([1]),
        }

    program = compile_program(rows_of_heads, arguments(3, 4), {"cache": [0, 2]}, folder)
    for rows, length in ((3, 4), (8, 6), (2, 33)):
        (y,) = program.function(program.inputs(arguments(rows, length)))
        assert torch.equal(y, rows_of_heads(**arguments(rows, length))[0])


def halved_where_long(x):
    return (x / 2 if x.shape[0] > 4 else x,)


def of_seven(x):
    return (x + torch.ones(7, 1),)


def test_without_dynamo_a_program_is_refused():
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match="Dynamo is switched off"),
    ):
        compile_program(doubled, {"x": torch.ones(7, 3), "parts": [torch.ones(3)]}, {"x": [0]}, None)


def test_every_native_operator_that_graphs_call_has_a_c_function():
    library = cpu_kernel.library, row_kernel.library, attention_kernel.library
    assert all(item.available() for item in library)
    names = {
        name.removeprefix("dbf_native::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dbf_native::") and not name.startswith("dbf_native::factor_")  # of the factorizer
    }
    assert names == {*ahead_of_time._C_FUNCTIONS, "prepare_layers"}


@pytest.mark.parametrize("function", [halved_where_long, of_seven])
def test_a_program_of_one_size_alone_is_refused(function):
    with pytest.raises(Exception, match="sizes that may change are fixed"):
        compile_program(function, {"x": torch.ones(7, 3)}, {"x": [0]}, None)
