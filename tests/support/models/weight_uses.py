"""Modules that use a weight of theirs without a call of its layer, in all the ways that people do."""

from __future__ import annotations

from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layers(nn.Module):
    """Linear layers under all kinds of names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"x": nn.Linear(4, 4)})
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.slow, self.scale = False, 2.0


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x, layer.weight)


def traced(function: Any) -> Any:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Direct(Layers):
    def forward(self, x):
        return functional.linear(self.b(x), self.a.weight, self.a.bias)


class Keyword(Layers):
    def forward(self, x):
        return functional.linear(input=x, weight=self.a.weight)


class Transposed(Layers):
    def forward(self, x):
        return self.a(x) @ self.a.weight.T + self.b(x)


class Alias(Layers):
    def forward(self, x):
        layer = self.a
        weight = layer.weight
        return x @ weight.to(x.dtype)


class Unpacked(Layers):
    def forward(self, x):
        first, second = self.a, self.b
        (weight, bias), _ = (first.weight, first.bias), second(x)
        return torch.addmm(bias, x, weight)


class Loop(Layers):
    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = functional.linear(x, layer.weight * number)
        return x


class Comprehension(Layers):
    def forward(self, x):
        return x @ torch.cat([layer.weight for layer in self.layers])


class ByIndex(Layers):
    def forward(self, x):
        return self.layers[0](x) + x @ self.layers[-1].weight


class ByName(Layers):
    def forward(self, x):
        return x @ getattr(self, "a").weight + x @ self.named["x"].weight  # noqa: B009


class Below(Layers):
    def forward(self, x):
        return x @ self.inner[0].weight.data


class ThroughMethod(Layers):
    def forward(self, x):
        return self.combine(x)

    def combine(self, x):
        return x @ self.a.weight


class MethodThatReturnsALayer(Layers):
    def get_layer(self):
        return self.a if self.slow else self.b

    def forward(self, x):
        return x @ self.get_layer().weight


class Property(Layers):
    @property
    def kernel(self):
        return self.a.weight

    @cached_property
    def other(self):
        return self.b

    def forward(self, x):
        return x @ self.kernel + x @ self.other.weight


class Function(Layers):
    def forward(self, x):
        return product(x, self.a) + product(x, layer=self.b)


class Decorated(Layers):
    @traced
    def forward(self, x):
        return x @ self.a.weight


class Inherited(Direct):
    pass


class Lambda(Layers):
    def forward(self, x):
        run = lambda y: functional.linear(y, self.a.weight)  # noqa: E731
        return run(x)


class Local(Layers):
    def forward(self, x):
        def run(y):
            return functional.linear(y, self.a.weight)

        return torch.utils.checkpoint.checkpoint(run, x)


class Partial(Layers):
    def forward(self, x):
        return partial(functional.linear, weight=self.a.weight)(x)


class Stored(Layers):
    def forward(self, x):
        self.kept = self.a.weight
        return x @ self.kept


class InPlace(Layers):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-1, 1)
        return self.a(x)


class Set(Layers):
    def forward(self, x):
        self.a.weight = self.b.weight
        return self.a(x)


class Embeds(Layers):
    def forward(self, x):
        return functional.embedding(x.long(), self.a.weight)


class Indexed(Layers):
    def forward(self, x):
        return x @ self.a.weight[:2].T


class Walked(Layers):
    def forward(self, x):
        return sum((m.weight.sum() for m in self.modules() if isinstance(m, nn.Linear)), x)


class Penalty(Layers):
    def forward(self, x):
        return self.a(x), sum(p.square().sum() for p in self.inner.parameters())


class Switched(Layers):
    def forward(self, x):
        if self.slow and x.dim() > 1:
            return x @ self.a.weight
        elif not self.slow:
            return x @ self.b.weight
        return self.a(x)


class InTraining(Layers):
    def forward(self, x):
        if self.training:
            return x @ self.a.weight
        return self.a(x)


class Walrus(Layers):
    def forward(self, x):
        if (weight := self.a.weight) is not None:
            return x @ weight


class Einsum(Layers):
    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.a.weight)


class Norm(Layers):
    def forward(self, x):
        return self.a(x) / self.a.weight.norm(dim=1)


class Parameters(Layers):
    def forward(self, x):
        x = functional.linear(x, self.a._parameters["weight"], self.get_parameter("b.bias"))
        return x @ self.get_parameter("inner.0.weight") + self.get_submodule("b")(x)


class State(Layers):
    def forward(self, x):
        return self.a(x) @ self.inner.state_dict()["0.weight"]


class Torn(Layers):
    def forward(self, x):
        first, *_ = self.layers
        return self.a(x) @ first.weight


class Matched(Layers):
    def forward(self, x):
        match x.dim():
            case 3:
                weight = self.a.weight
            case _:
                weight = self.b.weight
        return x @ weight


# To the names of the layers that must keep their weights.
LINEAR_KINDS = (nn.Linear, nn.Conv1d)


class AsksItsChildren(Layers):
    def forward(self, x):
        for module in self.inner:
            x = module(x) if isinstance(module, nn.Linear) else x
        return x


class AsksByTuple(Layers):
    def forward(self, x):
        return self.a(x) if isinstance(self.a, (nn.Bilinear, *LINEAR_KINDS)) else x


class AsksByConstant(Layers):
    def forward(self, x):
        return self.a(x) if isinstance(self.a, LINEAR_KINDS) else x


class AsksForType(Layers):
    def forward(self, x):
        return self.a(x) if type(self.a) is nn.Linear else x


class AsksForName(Layers):
    def forward(self, x):
        return self.a(x) if self.a.__class__.__name__ == "Linear" else x


class Matches(Layers):
    def forward(self, x):
        match self.a:
            case nn.Linear(in_features=4):
                return self.a(x)
        return x


class AsksForOtherKinds(Layers):
    def forward(self, x):
        assert isinstance(self, Layers) and isinstance(self.a, nn.Module) and type(self).__name__
        return self.a(x) if not isinstance(self.a, nn.Embedding) else x


USED: dict[type[Layers], str] = {
    Parameters: "a inner.0",
    State: "inner.0",
    Torn: "layers.0 layers.1",
    Matched: "a b",
    Direct: "a",
    Keyword: "a",
    Transposed: "a",
    Alias: "a",
    Unpacked: "a",
    Loop: "layers.0 layers.1",
    Comprehension: "layers.0 layers.1",
    ByIndex: "layers.0 layers.1",
    ByName: "a named.x",
    Below: "inner.0",
    ThroughMethod: "a",
    MethodThatReturnsALayer: "a b",
    Property: "a b",
    Function: "a b",
    Decorated: "a",
    Inherited: "a",
    Lambda: "a",
    Local: "a",
    Partial: "a",
    Stored: "a",
    InPlace: "a",
    Set: "a b",
    Embeds: "a",
    Indexed: "a",
    Walked: "a b layers.0 layers.1 named.x inner.0",
    Penalty: "inner.0",
    Switched: "b",
    InTraining: "a",
    Walrus: "a",
    Einsum: "a",
    Norm: "a",
    AsksItsChildren: "inner.0",
    AsksByTuple: "a",
    AsksByConstant: "a",
    AsksForType: "a",
    AsksForName: "a",
    Matches: "a",
    AsksForOtherKinds: "",
}
