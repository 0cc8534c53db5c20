"""Averages of models by torch leave the words of signs and rows as the model has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models.sharing import sharing
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from dbf_compile.tables import QuantizedRows, table_layer


def average(mean: Tensor, value: Tensor, count: int) -> Tensor:
    return mean.lerp(value, 0.1) if value.is_floating_point() else value


WAYS: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean, with buffers": {"use_buffers": True},
    "exponential": {"avg_fn": get_ema_avg_fn(0.9)},
    "exponential, all at once": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "one that leaves integers alone": {"avg_fn": average},
}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    head = nn.Linear(24, 40)
    table = table_layer(head, QuantizedRows.of(head.weight, "int8"))
    return nn.ModuleDict({"layers": sharing(seed), "head": table, "dense": nn.Linear(3, 2)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", [nn.Module.eval, nn.Sequential])
def test_words_are_those_of_the_model_and_all_else_is_averaged(way: str, wrap: Any) -> None:
    source = model()
    averaged = AveragedModel(source, **WAYS[way])
    for step in range(4):
        nn.init.constant_(source["dense"].bias, step)
        averaged.update_parameters(wrap(source))
    for name, value in source.state_dict().items():
        mean = averaged.module.state_dict()[name]
        if not value.is_floating_point():
            assert torch.equal(mean, value), name
        elif name == "dense.bias":
            assert float(mean[0]) < 3
        else:
            assert torch.allclose(mean, value, rtol=2e-3), name


def test_words_that_change_are_followed() -> None:
    averaged = AveragedModel(model())
    averaged.update_parameters(model(0))
    averaged.update_parameters(model(1))
    assert torch.equal(averaged.module["layers"].q.signs_in, model(1)["layers"].q.signs_in)


def test_dense_models_are_averaged_as_ever() -> None:
    source = nn.Linear(2, 2)
    source.register_parameter("steps", nn.Parameter(torch.tensor([1, 5]), requires_grad=False))
    averaged = AveragedModel(source)
    for steps in (1, 3):
        source.steps.copy_(torch.tensor([steps, 5]))
        averaged.update_parameters(source)
    assert averaged.module.steps.tolist() == [2, 5]
