"""One function is read: which paths from ``self`` it uses the weight of, under which settings, and what it returns."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dbf_compile.candidates.reader import SELF, read

Settings = dict[tuple[str, ...], set[tuple[str, bool]]]


class Model(nn.Module):
    """Functions to read; none is called."""

    @property
    def first(self):
        return self.layers[0]

    def get(self, name):
        return getattr(self, name)

    def simple(self, x):
        return x @ self.a.b.weight

    def settings(self, x):
        if self.config.slow and x is not None and self.mode != "fast":
            return x @ self.a.weight
        if self.training:
            x = x @ self.c.weight
        elif not self.quick:
            x = x @ self.d.weight
        else:
            x = x @ self.e.weight
        return x

    def nested(self, x):
        if self.one:
            return self.simple(x)

    def recursive(self, x):
        return self.recursive(x @ self.a.weight)

    def long(self):
        layer = self
        while layer.next is not None:
            layer = layer.next
        return layer

    def returned(self):
        return self.first, [self.get("a")], {"k": self.named["k"]}, (self.x if self.y else self.z)

    def looks(self, x):
        weight = self.a.weight
        return x.to(weight), weight.shape, weight.size(0), weight is None, x.new_zeros(weight.shape)

    def walked(self):
        return list(self.modules()), dict(self.named_children()), self.get_submodule("a.b")


def uses(name: str) -> Settings:
    function: Any = getattr(Model, name)
    reading = read(function, Model, frozenset({("self", SELF)}))
    assert all(" in Model." in where for where in reading.uses.values())
    return {path: set(tests) for path, tests in reading.uses}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simple", {("a", "b"): set()}),
        (
            "settings",
            {
                ("a",): {("lambda self: self.config.slow", True), ("lambda self: self.mode != 'fast'", True)},
                ("c",): set(),
                ("d",): {("lambda self: not self.quick", True)},
                ("e",): {("lambda self: not self.quick", False)},
            },
        ),
        ("nested", {("a", "b"): {("lambda self: self.one", True)}}),
        ("recursive", {("a",): set()}),
        ("looks", {}),
    ],
)
def test_uses_and_the_settings_that_they_depend_on(name: str, expected: Settings) -> None:
    assert uses(name) == expected


def returns(name: str) -> set[tuple[str, ...]]:
    function: Any = getattr(Model, name)
    return set(read(function, Model, frozenset({("self", SELF)})).returned.layers)


def test_layers_that_are_returned() -> None:
    assert returns("returned") >= {("layers",), ("layers", "*"), ("named", "*"), ("x",), ("z",)}
    assert returns("walked") >= {("**",), ("*",), ("a", "b")}
    assert max(map(len, returns("long"))) <= 6
