"""Weights that are used without a call are known from the source; calls and looks are no uses."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from support.models.weight_uses import USED, Inherited, Layers, ThroughMethod
from torch import Tensor, nn

from dbf_compile.candidates.uses import weight_uses


def cast(x: Tensor, weight: Tensor) -> Tensor:
    return x.to(weight.dtype)


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
    assert weight_uses(model) == {model.a: "whose weight is used without a call in Direct.forward"}


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
