"""What a block has lost is made up for in closed form: least squares, as strong as other windows bear, where it is exact."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dbf_compile.compression.compensation import Residuals, best_correction, writes_output

sizes = st.integers(1, 9)
problems = st.tuples(sizes, sizes, st.integers(1, 40), st.integers(0, 2**16))  # N, K, T, seed


def pairs_of(outputs, features, positions, seed, correction=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(positions, features, generator=generator)
    e = torch.randn(positions, outputs, generator=generator)
    return x, e if correction is None else e + x @ correction.mT


@given(problems, st.sampled_from([0.01, 0.3, 3.0]))
def test_a_correction_is_the_ridge_solution(problem, strength):
    x, e = pairs_of(*problem)
    correction = Residuals.of([(x, e)]).correction(strength)
    wide_x, wide_e = x.double(), e.double()
    square = wide_x.mT @ wide_x
    exact = torch.linalg.solve(square + strength * square.diagonal().diag(), wide_x.mT @ wide_e).mT
    # Float32 rounds by 6e-8, and a system of up to 9 features at λ >= 0.01 makes a thousand times as much of it.
    torch.testing.assert_close(correction.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@given(problems, st.integers(1, 3))
def test_sums_do_not_depend_on_how_positions_are_split(problem, parts):
    x, e = pairs_of(*problem)
    whole = Residuals.of([(x, e)])
    split = Residuals.of([pair for pair in zip(x.chunk(parts), e.chunk(parts), strict=True) if len(pair[0])])
    torch.testing.assert_close(split.inputs, whole.inputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(split.errors, whole.errors, atol=1e-4, rtol=1e-4)


@given(problems)
def test_the_gain_is_that_of_the_weighted_squares(problem):
    x, e = pairs_of(*problem)
    weights = torch.rand(problem[0], generator=torch.Generator().manual_seed(1))
    sums = Residuals.of([(x, e)])
    correction = sums.correction(0.1)
    left = e - x @ correction.mT
    fall = float((weights * (e.square() - left.square())).sum())
    assert sums.gain(correction, weights) == pytest.approx(fall, rel=1e-3, abs=1e-4 * float(e.square().sum()))


@given(problems)
def test_features_that_are_always_zero_get_no_correction(problem):
    x, e = pairs_of(*problem)
    x[:, 0] = 0
    correction = Residuals.of([(x, e)]).correction(0.01)
    assert torch.isfinite(correction).all() and not correction[:, 0].any()


def test_what_is_lost_is_found_again_and_noise_is_not_learned():
    lost = torch.randn(5, 12, generator=torch.Generator().manual_seed(7))
    seen = Residuals.of([pairs_of(5, 12, 400, 0, lost)])
    other = Residuals.of([pairs_of(5, 12, 400, 1, lost)])
    weights = torch.ones(5)
    found = best_correction(seen, other, weights)
    # 400 positions of noise as large as a feature: each entry is off by a twentieth.
    assert (found - lost).abs().max() < 0.25
    assert other.gain(found, weights) > 0
    noise, other = (Residuals.of([pairs_of(5, 12, 16, seed)]) for seed in (2, 3))
    assert best_correction(noise, other, weights) is None


def test_without_other_windows_the_correction_is_careful():
    lost = torch.ones(3, 4)
    seen = Residuals.of([pairs_of(3, 4, 400, 0, lost)])
    found = best_correction(seen, None, torch.ones(3))
    assert found.abs().sum() < 0.7 * lost.abs().sum()


def test_what_is_not_finite_is_left_alone():
    x, e = pairs_of(3, 4, 10, 0)
    x[0, 0] = float("inf")
    sums, weights = Residuals.of([(x, e)]), torch.ones(3)
    assert best_correction(sums, sums, weights) is None and best_correction(sums, None, weights) is None


class Block(nn.Module):
    """x + second(relu(first(x))), or what ``after`` makes of it."""

    def __init__(self, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.after = nn.Linear(8, 8), nn.Linear(8, 8), after or nn.Identity()

    def forward(self, x):
        self.flowing = (x, torch.relu(self.first(x)))
        return self.after(x + self.second(self.flowing[1]))


@pytest.mark.parametrize(
    ("block", "layer", "expected"),
    [
        (Block(), "second", True),
        (Block().to(torch.bfloat16), "second", True),
        (Block(), "first", False),
        (Block(nn.LayerNorm(8)), "second", False),
        (Block(nn.Tanh()), "second", False),
        (Block(nn.Linear(8, 6)), "second", False),
    ],
)
def test_a_layer_writes_the_output_only_if_it_is_a_summand(block, layer, expected):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(block.first.weight.dtype)

    def run():
        output = block(x)
        return block.flowing[layer == "second"], output

    before = copy.deepcopy(block.state_dict())
    assert writes_output(getattr(block, layer).weight.detach(), run) == expected
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def test_a_layer_that_reads_other_positions_than_the_output_has_does_not_write_it():
    assert not writes_output(torch.ones(4, 3), lambda: (torch.ones(2, 3), torch.ones(1, 5, 4)))


def test_a_layer_that_nothing_reaches_does_not_write_the_output():
    assert not writes_output(torch.ones(4, 3), lambda: (None, torch.ones(1, 5, 4)))
