"""The C++ steps of an ADMM update: against the reference in float64, and their bits for any number of threads."""

import pytest
import torch

from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.factor_update import cpu_kernel, reference

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="this machine has no C++ compiler")
SHAPES = [(1, 1, 1), (1, 33, 17), (2, 7, 130), (1, 257, 64), (3, 32, 16), (1, 5, 4099), (1, 300, 1)]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # rounding, relative to the largest number
RELAXATIONS = (0.75, 1.45)


@pytest.fixture(autouse=True)
def loaded():
    assert cpu_kernel.library.available()


def factor(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(shape, generator=generator)
    point[..., 0] = 0.0
    point[:, -1] *= -0.0  # zeros of both signs
    rows = torch.rand(shape[:2], generator=generator)
    columns = torch.nn.functional.normalize(torch.rand(shape[0], shape[2], generator=generator), dim=-1)
    return point, rows, columns


def double(*tensors):
    return [tensor.double() for tensor in tensors]


def assert_near(mine, exact, tolerance):
    assert bool(torch.isfinite(mine).all())
    assert (mine.double() - exact).abs().max() <= tolerance * max(1e-30, exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_anchor_is_that_of_the_reference(shape, dtype):
    state = factor(shape)
    turned = (shape[0], shape[2], shape[1])
    out = torch.full(turned, torch.nan, dtype=dtype)
    assert cpu_kernel.anchor(*state, 0.93, out) is out
    assert_near(out, reference.anchor(*double(*state), 0.93, torch.empty(turned).double()), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rest_is_that_of_the_reference(shape, dtype):
    target, product, share = factor(shape)[0], factor(shape, 1)[0].to(dtype), torch.rand(shape[0])
    exact = reference.rest(*double(target, product, share))
    assert cpu_kernel.rest(target, product, share) is product
    assert_near(product, exact, DTYPES[dtype])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_advance_is_that_of_the_reference(shape, dtype, relaxation, keep):
    state, step, share = factor(shape), factor(shape, 1)[0].to(dtype), torch.rand(shape[0])
    exact = double(*state)
    reference.advance(*exact, *double(step, share), relaxation, 0.93, keep)
    cpu_kernel.advance(*state, step, share, relaxation, 0.93, keep)
    for mine, wanted in zip(state, exact, strict=True):
        assert_near(mine, wanted, 1e-5)  # sums of up to 4,099 terms in float32


@pytest.mark.parametrize("averaging", [-0.1, 0.55])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_average_is_that_of_the_reference(shape, averaging):
    state, basis = factor(shape), factor(shape, 1)[0]
    exact = basis.double()
    reference.average(*double(*state), averaging, exact)
    cpu_kernel.average(*state, averaging, basis)
    assert_near(basis, exact, DTYPES[torch.float32])


def test_bits_do_not_depend_on_threads():
    def results():
        state, basis = factor((2, 301, 515)), factor((2, 301, 515), 2)[0]
        cpu_kernel.advance(*state, factor((2, 301, 515), 1)[0], torch.tensor([0.3, 0.6]), 1.2, 0.9, False)
        cpu_kernel.average(*state, 0.4, basis)
        return [*state, basis, cpu_kernel.anchor(*state, 0.9, torch.empty(2, 515, 301, dtype=torch.bfloat16))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        assert all(torch.equal(mine, other) for mine, other in zip(results(), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_numbers_that_are_not_finite_show_in_the_rows():
    point, rows, columns = factor((1, 8, 40))
    step = torch.zeros(1, 8, 40)
    step[0, 3, 5] = torch.nan
    cpu_kernel.advance(point, rows, columns, step.bfloat16(), torch.ones(1), 1.0, 0.9, False)
    assert bool(torch.isnan(rows).any())


def test_parts_that_do_not_fit_together_are_refused():
    point, rows, columns = factor((1, 8, 40))
    with pytest.raises(RuntimeError, match="do not fit"):
        cpu_kernel.anchor(point, rows[:, :7], columns, 0.9, torch.empty(1, 40, 8))
    with pytest.raises(RuntimeError, match="do not fit"):
        cpu_kernel.anchor(point.mT.contiguous().mT, rows, columns, 0.9, torch.empty(1, 40, 8))
    with pytest.raises(RuntimeError, match="not float32"):
        cpu_kernel.anchor(point, rows, columns, 0.9, torch.empty(1, 40, 8, dtype=torch.float16))


def test_small_factors_and_other_devices_go_to_the_reference():
    assert cpu_kernel.takes(torch.empty(1, 256, 256))
    assert not cpu_kernel.takes(torch.empty(1, 255, 256))
    assert not cpu_kernel.takes(torch.empty(1, 256, 256, device="meta"))
