"""The C++ kernel against a float64 reference, and the promises it makes about threads and batches."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.strategies import (
    FLOAT_DTYPES,
    activations,
    double_binary_factors,
    float_dtypes,
    random_scale,
    random_signs,
    seeds,
    sizes,
)
from torch import Tensor

from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.kernels.sign_matmul.reference import sign_matmul
from dbf_compile.signs import interleave, pack_signs
from dbf_compile.testing import assert_close

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="this machine has no C++ compiler")

INT = torch.int32


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert cpu_kernel.available()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def poisoned(x: Tensor, words: Tensor, **settings: bool) -> Tensor:
    """Run the kernel on an output full of NaN, so that an entry that it does not write shows."""
    out = torch.full((*x.shape[:-1], words.shape[0]), torch.nan)
    stored = interleave(words) if settings.get("interleaved") else words
    result = torch.ops.dbf_native.sign_matmul.out(x, stored, **settings, out=out)
    assert result is out
    return out


def assert_right(y: Tensor, x: Tensor, words: Tensor, fast: bool = False) -> None:
    # Each of the four values of an entry is rounded by half a unit. Exact: the unit is a power of two, at most 2 / 8355000 of
    # the largest group. Fast: the unit is 1 / 32630 of that group; float32 scales by it with an error of 2^-23, 0.004 units.
    groups = -(-x.shape[-1] // 4)
    padded = torch.nn.functional.pad(x.double().abs(), (0, 4 * groups - x.shape[-1]))
    largest = padded.unflatten(-1, (groups, 4)).sum(-1).amax(-1, keepdim=True) if groups else torch.zeros(1)
    rounding = 2.02 / 32630 if fast else 4 / 8355000
    truth = sign_matmul(x.double(), words)
    assert y.dtype == torch.float32
    # At the end the sum is rounded to float32, be it a denormal one.
    assert_close(y, truth, bound=groups * rounding * largest + 2.0**-24 * truth.abs() + 2.0**-150)


@given(sizes, sizes, seeds, st.booleans(), st.booleans(), st.data())
def test_odd_shapes_and_all_dtypes(
    rows: int, cols: int, seed: int, interleaved: bool, fast: bool, data: st.DataObject
) -> None:
    words, x = pack_signs(random_signs(rows, cols, seed)), data.draw(activations(cols))
    assert_right(poisoned(x, words, interleaved=interleaved, fast=fast), x, words, fast)


ISAS = {"x86_64": ("portable", "avx2", "avx512", "avx512_vbmi", "amx"), "aarch64": ("portable", "neon")}


@pytest.fixture(params=ISAS.get(platform.machine(), ("portable",)))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set in turn; those that this processor does not have are skipped."""
    monkeypatch.setenv("DBF_CPU_ISA", request.param)
    try:
        poisoned(torch.ones(1, 1), torch.ones(1, 1, dtype=INT))
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    return str(request.param)


def adversaries(cols: int) -> dict[str, Tensor]:
    """Return activations that are hard on fixed point: by name, each [3, cols] in float32."""
    generator = torch.Generator().manual_seed(cols)
    normal = torch.randn(3, cols, generator=generator)
    decades = torch.randint(-20, 20, (3, cols), generator=generator)
    one_hot = torch.zeros(3, cols)
    one_hot[range(3), torch.arange(3) % cols] = torch.tensor([1.0, -3.5e38 / 2, 1e-45])
    return {
        "normal": normal,
        "huge dynamic range": normal * 10.0**decades,
        "outliers": torch.where(torch.rand(3, cols, generator=generator) < 0.01, 1000 * normal, normal),
        "all equal": torch.full((3, cols), 0.1),
        "one hot": one_hot,
        "zeros": torch.zeros(3, cols),
        "denormals": normal * 1e-40,
        "near the end of the range": normal.clamp(-2, 2) * 2.0**126 / cols,
    }


@pytest.mark.parametrize("cols", [1, 33, 4099])
@pytest.mark.parametrize("fast", [False, True])
def test_adversaries_on_every_instruction_set(isa: str, cols: int, fast: bool) -> None:
    words = pack_signs(random_signs(83, cols, 0))
    for name, x in adversaries(cols).items():
        for interleaved in (False, True):
            y = poisoned(x, words, interleaved=interleaved, fast=fast)
            assert_right(y, x, words, fast)
            truth = sign_matmul(x.double(), words)
            if name in ("normal", "all equal", "zeros", "huge dynamic range") and cols > 1:
                # The accuracy that is promised, over all rows.
                assert (y - truth).norm() <= (1e-4 if fast else 1e-6) * truth.norm()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_instruction_set_and_layout_gives_the_same_bits(
    isa: str, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9 and 70 tokens: more than a kernel takes at once.
    for rows, cols, tokens in ((1, 1, 1), (64, 4096, 1), (131, 517, 9), (259, 8200, 2), (40, 130, 70)):
        words = pack_signs(random_signs(rows, cols, rows))
        x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
        monkeypatch.setenv("DBF_CPU_ISA", "portable")
        expected = poisoned(x, words, fast=fast)
        monkeypatch.setenv("DBF_CPU_ISA", isa)
        for interleaved in (False, True):
            assert torch.equal(poisoned(x, words, interleaved=interleaved, fast=fast), expected)


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DBF_CPU_ISA", "abacus")
    with pytest.raises(RuntimeError, match=r"DBF_CPU_ISA=abacus; allowed here: .*portable; unset it"):
        poisoned(torch.ones(1, 1), torch.ones(1, 1, dtype=INT))


@given(
    factors=double_binary_factors(),
    seed=seeds,
    tokens=st.sampled_from((0, 1, 2, 9, 70)),
    dtype=float_dtypes,
    bias=st.booleans(),
    interleaved=st.booleans(),
    fast=st.booleans(),
)
def test_a_whole_layer_is_its_two_products_bit_for_bit(
    factors: DoubleBinaryFactors,
    seed: int,
    tokens: int,
    dtype: torch.dtype,
    bias: bool,
    interleaved: bool,
    fast: bool,
) -> None:
    x = torch.randn(tokens, factors.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    shift = random_scale(factors.out_features, seed, dtype) if bias else None
    tensors = factors.tensors()
    if interleaved:
        tensors |= {name: interleave(tensors[name]) for name in ("signs_in", "signs_out")}
    settings = {"interleaved": interleaved, "fast": fast}
    h = cpu_kernel.sign_matmul_cpu(x, tensors["signs_in"], tensors["scale_in"], **settings)
    expected = cpu_kernel.sign_matmul_cpu(
        h, tensors["signs_out"], tensors["scale_mid"], tensors["scale_out"], shift, dtype, **settings
    )
    out = torch.full((tokens, factors.out_features), torch.nan, dtype=dtype)
    torch.ops.dbf_native.double_binary_linear.out(x, **tensors, bias=shift, **settings, out=out)
    # Infinite results of float16 included.
    assert torch.equal(out.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))


@pytest.mark.parametrize("tokens", range(34))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    words = pack_signs(random_signs(37, 65, tokens))
    x = torch.randn(tokens, 65, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    assert_right(poisoned(x, words), x, words)


@pytest.mark.parametrize(("rows", "cols"), [(1, 4097), (259, 2049), (513, 260), (3, 100_003)])
@pytest.mark.parametrize("tokens", [1, 18])
def test_sizes_beyond_one_block_of_rows_or_tables(rows: int, cols: int, tokens: int) -> None:
    words = pack_signs(random_signs(rows, cols, 0))
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(0))
    assert_right(poisoned(x, words), x, words)


@given(sizes, st.integers(1, 40), seeds, float_dtypes)
@example(cols=1, tokens=1, seed=0, dtype=torch.float16)
def test_small_whole_numbers_come_out_exactly(cols: int, tokens: int, seed: int, dtype: torch.dtype) -> None:
    # Sums of small integers need no rounding: every column must count, with its own sign, exactly once.
    words = pack_signs(random_signs(13, cols, seed))
    x = torch.randint(-8, 9, (tokens, cols), generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert torch.equal(poisoned(x, words), sign_matmul(x, words))


@given(sizes, sizes, seeds, float_dtypes)
def test_a_token_does_not_depend_on_its_batch(rows: int, cols: int, seed: int, dtype: torch.dtype) -> None:
    words = pack_signs(random_signs(rows, cols, seed))
    x = torch.randn(33, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole = poisoned(x, words)
    for tokens in (1, 2, 3, 7, 15, 16, 17, 31):
        assert torch.equal(poisoned(x[:tokens], words), whole[:tokens])
        assert torch.equal(poisoned(x[-tokens:], words), whole[-tokens:])


@given(sizes, seeds, st.sampled_from([1, 2, 5, 16, 33]))
def test_a_row_does_not_depend_on_the_rows_around_it(cols: int, seed: int, tokens: int) -> None:
    words = pack_signs(random_signs(300, cols, seed))
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    whole = poisoned(x, words)
    for rows in (slice(0, 1), slice(3, 10), slice(250, 300)):
        assert torch.equal(poisoned(x, words[rows].contiguous()), whole[:, rows].contiguous())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_number_of_threads_changes_no_bit(tokens: int, dtype: torch.dtype) -> None:
    words = pack_signs(random_signs(517, 131, 0))
    x = torch.randn(tokens, 131, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.set_num_threads(1)
    alone = poisoned(x, words)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert torch.equal(poisoned(x, words), alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_with_its_token(value: float) -> None:
    words = pack_signs(random_signs(37, 65, 0))
    x = torch.randn(18, 65, generator=torch.Generator().manual_seed(0))
    clean = poisoned(x, words)
    x[3, 64] = value
    y = poisoned(x, words)
    assert torch.equal(torch.cat((y[:3], y[4:])), torch.cat((clean[:3], clean[4:])))
    assert torch.equal(y[3].isnan(), sign_matmul(x, words)[3].isnan())
    assert not y[3].isfinite().any()


@given(sizes, sizes, seeds)
def test_negated_activations_give_the_negated_result(rows: int, cols: int, seed: int) -> None:
    # Rounding is symmetric: bit for bit, but for the sign of zero, which == does not see.
    words = pack_signs(random_signs(rows, cols, seed))
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(poisoned(-x, words), -poisoned(x, words))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40), (40,), (2, 3, 5, 40)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    words = pack_signs(random_signs(5, 40, 0))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = cpu_kernel.sign_matmul_cpu(x, words)
    assert y.shape == (*shape[:-1], 5)
    assert_right(y, x, words)


def test_no_rows_and_no_columns() -> None:
    assert poisoned(torch.ones(3, 40), torch.zeros(0, 2, dtype=INT)).shape == (3, 0)
    assert torch.equal(poisoned(torch.ones(3, 0), torch.zeros(5, 0, dtype=INT)), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    words = pack_signs(random_signs(37, 65, 0))
    x = torch.randn(6, 65, generator=torch.Generator().manual_seed(0)).to(dtype)
    strided_words = torch.stack((words, ~words), -1)[..., 0]
    plain = cpu_kernel.sign_matmul_cpu(x, words)
    for view in (x.T.contiguous().T, torch.stack((x, x + 1), -1)[..., 0], torch.cat((x, x), 1)[:, 65:]):
        assert not view.is_contiguous()
        assert torch.equal(cpu_kernel.sign_matmul_cpu(view, strided_words), plain)


def test_padding_bits_mean_nothing() -> None:
    words = pack_signs(random_signs(37, 65, 0))
    spoilt = words.clone()
    spoilt[:, -1] |= -2  # all but the last column's bit
    x = torch.randn(18, 65, generator=torch.Generator().manual_seed(0))
    assert torch.equal(poisoned(x, spoilt), poisoned(x, words))


def test_a_view_into_a_larger_tensor_is_written_alone() -> None:
    words = pack_signs(random_signs(37, 65, 0))
    memory = torch.full((18 * 37 + 64,), torch.nan)
    x = torch.randn(18, 65, generator=torch.Generator().manual_seed(0))
    torch.ops.dbf_native.sign_matmul.out(x, words, out=memory[32:-32].view(18, 37))
    assert memory[:32].isnan().all() and memory[-32:].isnan().all()
    assert torch.equal(memory[32:-32].view(18, 37), poisoned(x, words))
