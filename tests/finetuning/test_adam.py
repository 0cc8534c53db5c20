"""Adam with relative rates: torch's own steps in units of a tensor's size; zeros change nothing."""

import torch
from support.models.tiny import randn

from dbf_compile.finetuning.adam import RelativeAdam


def test_steps_are_those_of_torch():
    value = randn(13).double()
    size = float(value.square().mean().sqrt())
    expected = torch.nn.Parameter(value.clone())
    theirs = torch.optim.Adam([expected], lr=0.03 * size, betas=(0.9, 0.95), eps=0)
    ours = RelativeAdam({"x": value})
    for step in range(4):
        gradient = randn(13, seed=step).double()
        expected.grad = gradient.clone()
        for group in theirs.param_groups:
            group["lr"] = 0.03 * float(value.square().mean().sqrt())
        theirs.step()
        ours.step({"x": gradient}, 0.03)
        assert torch.allclose(value, expected)


def test_gradients_next_to_nothing_move_nothing():
    value, before = torch.ones(4), torch.ones(4)
    adam = RelativeAdam({"x": value})
    for size in (1e-25, 1e-22, 1e-18):
        adam.step({"x": torch.tensor([1.0, size, -size, 0.0])}, 0.1)
    assert float(value[0]) < 0.9 and torch.allclose(value[1:], before[1:], atol=1e-3)


def test_zeros_change_neither_value_nor_moments():
    value = randn(5)
    adam = RelativeAdam({"x": value})
    adam.step({"x": randn(5, seed=1)}, 0.1)
    before = value.clone(), {name: tensor.clone() for name, tensor in adam.state().items()}
    adam.step({"x": torch.zeros(5)}, 0.1)
    assert torch.equal(value, before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in adam.state().items())
