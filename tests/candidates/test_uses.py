"""Weights that are used without a call are known from the source; calls and looks are no uses."""

from __future__ import annotations

import types
from functools import cached_property, partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dbf_compile.candidates.uses import weight_uses


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


def cast(x: Tensor, weight: Tensor) -> Tensor:
    return x.to(weight.dtype)


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


USED = {
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
}


def used(model: nn.Module) -> set[str]:
    uses = weight_uses(model)
    return {
        name for name, module in model.named_modules() if module in uses and isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("kind", USED, ids=lambda kind: kind.__name__)
def test_uses_are_seen(kind: type[Layers]) -> None:
    assert used(kind()) == set(USED[kind].split())
    assert used(nn.ModuleDict({"wrapped": kind()})) == {f"wrapped.{name}" for name in USED[kind].split()}


def test_where_a_weight_is_used_is_said() -> None:
    model = Inherited()
    assert weight_uses(model) == {model.a: "Direct.forward"}


class Looks(Layers):
    """Calls its layers in all ways, and looks at their weights."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.a.weight)
        self.tie_weights()

    def tie_weights(self):
        self.a.weight.data.copy_(self.b.weight)

    def merged(self):
        return self.a.weight @ self.b.weight

    def helper(self, layer, x):
        return layer(x)

    def forward(self, x):
        weight = self.a.weight
        if isinstance(weight, Tensor) and weight.dtype != x.dtype and self.a.weight is not None:
            x = x.to(weight.dtype).to(self.b.weight.device)
        x = cast(x, self.a.weight)
        x = x.type_as(self.a.weight) + torch.zeros_like(self.b.weight)[0] + self.a.weight.new_zeros(4)
        assert self.a.weight.shape[0] == len(self.b.weight) and self.a.weight.size(1) > 1
        x = x.to(next(self.parameters()).dtype).to(next(iter(self.inner.parameters())).device)
        x = x * (getattr(self.a.weight, "ndim", 2) == 2) + torch.is_floating_point(self.a.weight)
        for layer in [*self.layers, *self.named.values(), self.inner]:
            x = layer(x)
        x = torch.utils.checkpoint.checkpoint(self.a, x) if x.requires_grad else self.helper(self.a, x)
        print(f"{self.a.weight.dtype}", sum(p.numel() for p in self.parameters()), self.a.bias.sum())
        return self.b(input=x)


def test_calls_looks_and_the_care_of_a_model_are_no_uses() -> None:
    assert used(Looks()) == set()


class ReadsAnother(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = ThroughMethod()
        self.other.forward = self.other.combine

    def forward(self, x):
        return self.other.combine(x)


def test_methods_that_other_modules_call_are_read() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Parts()

        def forward(self, x):
            return self.part.project(x)

    class Parts(Layers):
        def project(self, x):
            return x @ self.a.weight

        def never(self, x):
            return x @ self.b.weight

    assert used(Calls()) == {"part.a"}
    assert used(ReadsAnother()) == {"other.a"}


def test_a_forward_that_one_module_has_and_hooks_are_read() -> None:
    method, closed, hooked, object_hook, plain = (Looks() for _ in range(5))
    method.forward = types.MethodType(lambda self, x: x @ self.a.weight, method)

    def forward(x):
        return x @ closed.b.weight

    closed.forward = forward
    hooked.register_forward_hook(lambda module, args, y: y @ module.inner[0].weight)
    hooked.b.register_forward_pre_hook(lambda module, args: module.weight.clamp_(0))

    class Hook:
        def __call__(self, module, args):
            return args[0] @ module.a.weight

    object_hook.register_forward_pre_hook(Hook())
    plain.a.register_forward_hook(lambda module, args, y: y * 2)
    assert [used(model) for model in (method, closed, hooked, object_hook, plain)] == [
        {"a"},
        {"b"},
        {"inner.0", "b"},
        {"a"},
        set(),
    ]


def test_without_a_source_calls_are_assumed() -> None:
    space: dict[str, Any] = {"Layers": Layers}
    exec("class Unread(Layers):\n    def forward(self, x):\n        return x @ self.a.weight", space)
    assert used(space["Unread"]()) == set()


def test_modules_of_torch() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    assert used(encoder) == {"layers.0.self_attn.out_proj"}  # its fast path declines
    assert used(nn.TransformerDecoderLayer(8, 2, 16)) == {"self_attn.out_proj", "multihead_attn.out_proj"}
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)
    assert used(attention) == {"out_proj"}


def test_graph_modules_are_read() -> None:
    model = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (torch.ones(1, 4),)).module()
    assert {type(module) for module in weight_uses(model)} == {type(model.get_submodule("0"))}
