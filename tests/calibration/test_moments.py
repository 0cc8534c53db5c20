"""Running second moments: sums, clipping, and what few positions may not destroy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dbf_compile.calibration.moments import Moment, measuring


def rows(positions: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(
        positions, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 6), st.booleans())
def test_a_moment_does_not_depend_on_how_positions_come(counts, features, whole):
    x = rows(sum(counts), features)
    parts, at_once = Moment(whole), Moment(whole)
    for part in x.split(counts):
        parts.add(part)
    at_once.add(x)
    assert parts.positions == at_once.positions == sum(counts)
    torch.testing.assert_close(parts.mean(), at_once.mean())  # float64 sums in another order
    diagonal = at_once.mean().diagonal() if whole else at_once.mean()
    torch.testing.assert_close(diagonal, x.square().sum(0) / max(1, len(x)))


def test_nothing_accumulated_has_no_mean():
    assert Moment().mean() is None and Moment(whole=True).mean() is None


@pytest.mark.parametrize("whole", [False, True])
def test_masked_positions_do_not_count(whole):
    x, mask = rows(6, 3).view(2, 3, 3), torch.tensor([[True, False, True], [False, False, True]])
    masked, alone = Moment(whole), Moment(whole)
    masked.add(x, mask)
    alone.add(x[mask])
    assert torch.equal(masked.mean(), alone.mean()) and masked.positions == 3


@given(positions=st.integers(1, 30), features=st.integers(2, 20), seed=st.integers(0, 2**31))
def test_no_direction_counts_nothing_because_few_positions_left_it_out(positions, features, seed):
    x = rows(positions, features, seed)
    moment = Moment(whole=True)
    moment.add(x)
    mean = moment.mean()
    torch.testing.assert_close(mean.diagonal(), x.square().mean(0))
    # A share of the diagonal is in every direction, however few the positions are.
    share = features / (positions + features)
    least = share * x.square().mean(0).min()
    assert torch.linalg.eigvalsh(mean).min() >= (1 - 1e-9) * least - 1e-12


@given(st.integers(2, 40), st.integers(1, 6), st.floats(0.05, 0.95), st.integers(0, 99))
def test_clipped_rows_are_no_longer_than_the_quantile(positions, features, clip, seed):
    x = rows(positions, features, seed)
    moment = Moment(clip=clip)
    moment.add(x)
    norms = x.norm(dim=1)
    limit = norms.sort().values[int(clip * positions)]
    clipped = x * (norms.clamp_max(limit) / norms)[:, None]
    torch.testing.assert_close(moment.mean(), clipped.square().mean(0))  # float64, in another order
    assert moment.limit == pytest.approx(float(limit))


def test_a_later_batch_may_raise_the_limit_but_not_lower_it():
    moment = Moment(clip=0.5)
    limits = []
    for size in (1.0, 3.0, 2.0):
        moment.add(size * torch.nn.functional.normalize(rows(8, 4)))
        limits.append(moment.limit)
    assert limits == pytest.approx([1.0, 3.0, 3.0])


def test_rows_that_are_not_finite_are_left_for_the_importance_to_refuse():
    moment = Moment(clip=0.5)
    moment.add(torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))
    assert moment.mean().isnan().any()


@given(st.integers(0, 300), st.booleans(), st.integers(1, 8))
def test_few_batches_measure_for_every_block_and_no_kind_of_text_is_missed(batches, whole, kinds):
    places = measuring(batches, whole)
    assert places == sorted(set(places)) == measuring(batches, whole) and set(places) <= set(range(batches))
    assert len(places) == (batches if whole else min(batches, 64))
    for kind_of in (
        lambda place: place % kinds,
        lambda place: place * kinds // batches,
    ):  # in turns, in blocks
        assert {kind_of(place) for place in places} == {kind_of(place) for place in range(batches)}
