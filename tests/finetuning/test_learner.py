"""The learner: sums of gradients, states that restore it, losses that are not finite, hidden states."""

import pytest
import torch

pytest.importorskip("transformers")

from support.models.tiny import factored, tiny_llama

from dbf_compile.errors import TrainingError
from dbf_compile.finetuning.learner import Learner, Rates
from dbf_compile.finetuning.ranks import Ranks
from dbf_compile.finetuning.targets import Teacher
from dbf_compile.options import FinetuneConfig

CPU = torch.device("cpu")
FULL, HALF, NONE = Rates(0.1, 0.01, 0.001), Rates(0.05, 0.005, 0.0005), Rates(0.0, 0.0, 0.0)
WINDOWS = torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def learner(tmp_path):
    def build(ranks=Ranks(), **options):  # noqa: B008, it is frozen
        teacher = Teacher(lambda: tiny_llama(1), "x", 16, tmp_path, CPU)
        model = factored(tiny_llama(1), bits_per_weight=2.0)
        return Learner(model, teacher, FinetuneConfig(**options), torch.float32, ranks)

    return build


def test_it_learns(learner):
    one = learner()
    before = one.divergence(WINDOWS)
    losses = [one.step(WINDOWS, FULL)[0] for _ in range(6)]
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert one.divergence(WINDOWS) < losses[0]


def test_a_state_restores_it_bit_by_bit(learner):
    one, other = learner(), learner()
    one.step(WINDOWS, FULL)
    other.take_({name: tensor.clone() for name, tensor in one.state().items()})
    assert one.step(WINDOWS, HALF) == other.step(WINDOWS, HALF)
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())
    third = learner()
    third.take_(one.learned())
    assert third.divergence(WINDOWS) == one.divergence(WINDOWS)


def test_processes_that_share_a_step_sum_what_one_would(learner, monkeypatch):
    alone = learner()
    alone.step(WINDOWS, FULL)
    halves = [learner(Ranks(rank, 2)) for rank in range(2)]
    gradients = []
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensors: gradients.append([t.clone() for t in tensors]))
    for half in halves:
        half.step(WINDOWS, NONE)
    sums = [one + other for one, other in zip(*gradients, strict=True)]
    expected = list(alone._gradients.values())
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(sums[1:], expected, strict=True))


@pytest.mark.parametrize(("kept", "groups"), [(1, [1, 1, 1, 1]), (2**30, [4])])
def test_windows_in_groups_teach_what_single_ones_do(learner, monkeypatch, kept, groups):
    expected = learner()
    expected.step(WINDOWS, NONE)
    monkeypatch.setattr("dbf_compile.finetuning.learner._KEPT", kept)
    one, sizes = learner(), []
    whole = one._loss
    monkeypatch.setattr(one, "_loss", lambda windows: sizes.append(len(windows)) or whole(windows))
    one.step(WINDOWS, NONE)
    assert sizes == groups
    pairs = zip(one._gradients.values(), expected._gradients.values(), strict=True)
    assert all(torch.allclose(mine, theirs, atol=1e-6) for mine, theirs in pairs)


def test_a_process_without_a_window_of_a_step_adds_nothing(learner, monkeypatch):
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensors: None)
    idle = learner(Ranks(2, 3))
    loss, _ = idle.step(WINDOWS[:2], NONE)
    assert loss == 0 and idle.divergence(WINDOWS[:2]) == 0


def test_norms_stay_where_they_are_to(learner):
    one = learner(norm_rate=0.0)
    before = {name: value.clone() for name, value in one.small().items()}
    one.step(WINDOWS, FULL)
    assert all(torch.equal(value, before[name]) for name, value in one.small().items())


def test_hidden_states_count(learner):
    plain, hidden = learner(), learner(hidden=1.0)
    assert hidden.step(WINDOWS, NONE)[0] > plain.step(WINDOWS, NONE)[0]


def test_a_loss_that_is_not_finite_is_an_error(learner):
    one = learner()
    list(one._layers.values())[-1].weight.data.fill_(torch.nan)  # attention may hide some
    with pytest.raises(TrainingError, match="loss of nan"):
        one.step(WINDOWS, FULL)
