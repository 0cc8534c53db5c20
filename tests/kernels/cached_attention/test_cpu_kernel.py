"""Attention over a cache: the C++ kernel against the reference in float64, and its bits whatever stands beside a query."""

import pytest
import torch

from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.cached_attention import cpu_kernel
from dbf_compile.kernels.cached_attention.reference import cached_attention as reference

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="this machine has no C++ compiler")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # the rounding of the result
# B, H, H', T, D, V, L, window, cap
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 0, 0.0),
    (1, 9, 3, 1, 64, 64, 200, 0, 0.0),
    (2, 4, 4, 7, 32, 48, 77, 0, 0.0),
    (2, 6, 2, 33, 17, 19, 101, 16, 30.0),
    (3, 5, 1, 2, 80, 16, 64, 1, 0.0),
    (1, 8, 2, 70, 128, 128, 128, 5, 0.0),
]


@pytest.fixture(autouse=True)
def loaded():
    assert cpu_kernel.library.available()


def problem(shape, dtype, seed=0):
    B, H, heads, T, D, V, L, *_ = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, D, generator=generator).to(dtype)
    keys = torch.randn(B, heads, D, L, generator=generator).to(dtype)
    values = torch.randn(B, heads, L, V, generator=generator).to(dtype)
    positions = torch.randint(0, L - T + 1, (B, 1), generator=generator) + torch.arange(T)
    for row, last in enumerate(positions[:, -1].tolist()):  # what is not filled yet may be anything
        keys[row, :, :, last + 1 :] = torch.nan
        values[row, :, last + 1 :] = torch.nan
    return q, keys, values, positions


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_computes_the_reference(shape, dtype):
    q, keys, values, positions = problem(shape, dtype)
    settings = (shape[4] ** -0.5, *shape[-2:])
    y = cpu_kernel.cached_attention_cpu(q, keys, values, positions, *settings)
    exact = reference(q.double(), keys.double(), values.double(), positions, *settings)
    assert y.dtype == dtype and y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bits_depend_on_nothing_beside_a_query(dtype):
    shape = (2, 6, 2, 33, 48, 48, 160, 0, 0.0)
    q, keys, values, positions = problem(shape, dtype)
    whole = cpu_kernel.cached_attention_cpu(q, keys, values, positions, 0.2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for row in range(2):
            for part in (slice(0, 1), slice(5, 9), slice(30, 33)):
                tensors = (
                    q[row, None, :, part],
                    keys[row, None],
                    values[row, None],
                    positions[row, None, part],
                )
                y = cpu_kernel.cached_attention_cpu(*tensors, 0.2)
                assert torch.equal(y, whole[row, None, part])
    finally:
        torch.set_num_threads(before)


def test_positions_outside_of_the_cache_are_refused():
    q, keys, values, positions = problem((1, 1, 1, 1, 4, 4, 8, 0, 0.0), torch.float32)
    with pytest.raises(RuntimeError, match="position 8 in a cache of 8"):
        cpu_kernel.cached_attention_cpu(q, keys, values, torch.full_like(positions, 8), 1.0)
