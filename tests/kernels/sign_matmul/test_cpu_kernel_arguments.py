"""The C++ kernel's arguments: scales and bias, what it refuses, and what happens where it cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import activations, random_factors, random_scale, random_signs, seeds, sizes
from torch import Tensor

from dbf_compile.errors import BuildError
from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import sign_matmul
from dbf_compile.ops import double_binary_linear, prepare_layers
from dbf_compile.signs import interleave, pack_signs
from dbf_compile.testing import assert_close

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="this machine has no C++ compiler")

INT = torch.int32


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert cpu_kernel.available()


@pytest.mark.parametrize(
    ("x", "words", "out", "message"),
    [
        (
            torch.ones(2, 33, dtype=torch.float64),
            torch.zeros(3, 2, dtype=INT),
            torch.ones(2, 3),
            "takes float32",
        ),
        (torch.ones(2, 33).int(), torch.zeros(3, 2, dtype=INT), torch.ones(2, 3), "takes float32"),
        (torch.ones(2, 33), torch.zeros(3, 2).long(), torch.ones(2, 3), "needs int32 signs"),
        (
            torch.ones(2, 33),
            torch.zeros(3, 2, dtype=INT),
            torch.ones(2, 3).int(),
            "takes float32, .* for out",
        ),
        (torch.ones(33, 2).T, torch.zeros(3, 2, dtype=INT), torch.ones(2, 3), "contiguous"),
        (torch.ones(2, 33), torch.zeros(2, 3, dtype=INT).T, torch.ones(2, 3), "contiguous"),
        (torch.ones(2, 33), torch.zeros(3, 2, dtype=INT), torch.ones(3, 2).T, "contiguous"),
        (torch.ones(2, 32), torch.zeros(3, 2, dtype=INT), torch.ones(2, 3), "sizes"),
        (torch.ones(2, 65), torch.zeros(3, 2, dtype=INT), torch.ones(2, 3), "sizes"),
        (torch.ones(2, 33), torch.zeros(3, 2, dtype=INT), torch.ones(2, 4), "sizes"),
        (torch.ones(2, 33), torch.zeros(3, 2, dtype=INT), torch.ones(3, 3), "sizes"),
        (torch.ones(2, 33), torch.zeros(3, 2, dtype=INT), torch.ones(6), "sizes"),
        (torch.ones(2, 33), torch.zeros(6, dtype=INT), torch.ones(2, 3), "sizes"),
        (torch.ones(()), torch.zeros(3, 1, dtype=INT), torch.ones(3), "sizes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x: Tensor, words: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dbf_native.sign_matmul.out(x, words, out=out)


@given(
    K=sizes,
    N=sizes,
    seed=seeds,
    data=st.data(),
    result=st.sampled_from(cpu_kernel.DTYPES),
    vectors=st.lists(st.sampled_from((None, *cpu_kernel.DTYPES)), min_size=3, max_size=3),
)
def test_scales_and_bias_are_applied(
    K: int,
    N: int,
    seed: int,
    data: st.DataObject,
    result: torch.dtype,
    vectors: list[torch.dtype | None],
) -> None:
    signs, x = random_signs(N, K, seed), data.draw(activations(K))
    words = pack_signs(signs)
    scales = [
        None if dtype is None else random_scale(size, seed + index, dtype)
        for index, (dtype, size) in enumerate(zip(vectors, (K, N, N), strict=True))
    ]
    y = cpu_kernel.sign_matmul_cpu(x, words, *scales, result)
    assert y.dtype == result
    exact = sign_matmul(x.double(), words, *scales)
    in_scale, out_scale, bias = (
        torch.ones(size) if v is None else v.double().abs() for v, size in zip(scales, (K, N, N), strict=True)
    )
    shift = torch.zeros(N) if scales[2] is None else bias
    # One rounding per scale, K additions in float32, one rounding to the result's dtype.
    terms = (x.double().abs() * in_scale).sum(-1, keepdim=True) * out_scale + shift
    rounding = (K + 4) * torch.finfo(torch.float32).eps * terms + torch.finfo(result).eps * exact.abs()
    assert_close(y.double(), exact, bound=rounding + torch.finfo(result).smallest_normal)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"in_scale": torch.ones(32)}, "in_scale"),
        ({"out_scale": torch.ones(4)}, "out_scale"),
        ({"bias": torch.ones(3, 1)}, "bias"),
        ({"bias": torch.ones(6)[::2]}, "bias"),
        ({"out_scale": torch.ones(3, dtype=torch.float64)}, "takes float32, .* for out_scale"),
    ],
)
def test_scales_that_do_not_fit_are_refused(vectors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dbf_native.sign_matmul.out(
            torch.ones(2, 33), torch.zeros(3, 2, dtype=INT), **vectors, out=torch.ones(2, 3)
        )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget whether the kernel is available, until the end of the test."""
    monkeypatch.setattr(cpu_kernel.library, "_is_loaded", None)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_there_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path))  # without a library that was built before
    monkeypatch.setattr(cpp_build, "compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"slow reference kernel: no C\+\+ compiler") as caught:
        assert not cpu_kernel.available()
        assert not cpu_kernel.available()
    assert len(caught) == 1


@pytest.mark.usefixtures("fresh")
def test_a_library_that_cannot_be_loaded_counts_as_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setattr(cpp_build, "build", lambda source: broken)
    with pytest.warns(UserWarning, match="slow reference kernel"):
        assert not cpu_kernel.available()


@pytest.mark.usefixtures("fresh")
def test_errors_of_the_build_are_part_of_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path) -> Path:
        raise BuildError("broken compiler", "a good one", "install it")

    monkeypatch.setattr(cpp_build, "build", fail)
    with pytest.warns(UserWarning, match="broken compiler; allowed: a good one"):
        assert not cpu_kernel.available()


@settings(max_examples=40)
@given(
    K=sizes,
    parts=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    shape=st.sampled_from([(), (1,), (2, 3), (0,), (2, 0, 4)]),
    dtype=st.sampled_from([None, *cpu_kernel.DTYPES]),
    fast=st.booleans(),
    seed=seeds,
)
def test_prepared_layers_give_what_the_layers_give_one_by_one(
    K: int,
    parts: list[tuple[int, int]],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    fast: bool,
    seed: int,
) -> None:
    layers = []
    for number, (R, N) in enumerate(parts):
        own = random_factors(K, R, N, seed + number)
        layers.append(
            [interleave(own.signs_in), interleave(own.signs_out), own.scale_in, own.scale_mid, own.scale_out]
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((*shape, 2 * K), generator=generator)[..., ::2]  # not contiguous
    prepared = prepare_layers([tensor for layer in layers for tensor in layer])
    columns = sum(N for _, N in parts)
    y = torch.ops.dbf.prepared_layers(x, prepared, columns, dtype, fast)
    alone = [double_binary_linear(x, *layer, None, dtype, True, fast) for layer in layers]
    assert y.dtype == (dtype or torch.float32) and torch.equal(y, torch.cat(alone, -1))
    for wrong, size in ((x, columns + 1), (torch.ones(*shape, K + 1), columns), (x.double(), columns)):
        with pytest.raises(RuntimeError, match=r"sizes|takes float32"):
            torch.ops.dbf.prepared_layers(wrong, prepared, size, dtype, fast)
