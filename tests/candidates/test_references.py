"""Layers that are held outside of the modules: a replaced one would go on being called there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import dbf_compile
from dbf_compile.candidates.references import held_elsewhere


class Holder(nn.Module):
    """Has two layers, and holds what a function makes of the first in an attribute."""

    def __init__(self, hold: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.held = hold(self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


HOLDS: dict[str, Callable[[nn.Linear], Any]] = {
    "list": lambda layer: [layer],
    "nested": lambda layer: {"x": {"y": (layer,)}},
    "closure": lambda layer: lambda x: layer(x),
    "default": lambda layer: lambda x, own=layer: own(x),
    "bound method": lambda layer: layer.forward,
    "partial": lambda layer: partial(functional.linear, weight=layer.weight),
    "bias in a closure": lambda layer: lambda x: x + layer.bias,
    "closure of a closure": lambda layer: (lambda inner: lambda x: inner(x))(lambda x: layer(x)),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_layer_that_is_held_elsewhere_stays_dense(hold: Callable[[nn.Linear], Any]) -> None:
    model = Holder(hold).eval().requires_grad_(False)
    assert held_elsewhere(nn.Sequential(model)) == {
        model.first: "that Holder.held holds outside of its modules"
    }
    converted = dbf_compile.convert_(model, bits=4.0, preset="fast", iterations=2, progress=False)
    assert type(converted.first) is nn.Linear and type(converted.second) is not nn.Linear


@pytest.mark.parametrize("hold", [lambda layer: None, lambda layer: "first", lambda layer: layer.in_features])
def test_other_attributes_hold_nothing(hold: Callable[[nn.Linear], Any]) -> None:
    model = Holder(hold)
    model.first.compile(backend="eager")
    model.second.register_forward_hook(lambda module, args, output: output)
    assert not held_elsewhere(nn.Sequential(model))
