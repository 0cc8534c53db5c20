"""A layer is factored only if its weight alone says what it computes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dbf_compile.candidates.dense import dense_linears, linears, why_not_dense


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Tagged(Tensor):
    """A tensor subclass, as of quantized or sharded weights."""


def own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)  # type: ignore[method-assign]


def accelerated(layer: nn.Linear) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


def dtype(kind: torch.dtype) -> Callable[[nn.Linear], None]:
    def change(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(torch.ones(3, 5).to(kind), requires_grad=False)

    return change


def subclass(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(3, 5).as_subclass(Tagged))


def buffer(layer: nn.Linear) -> None:
    del layer.weight
    layer.register_buffer("weight", torch.ones(3, 5))


CASES: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "weight_norm": (torch.nn.utils.weight_norm, "with a weight that is computed before every call"),
    "spectral_norm": (torch.nn.utils.spectral_norm, "with a weight that is computed before every call"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "with a weight that is computed"),
    "pruned bias": (lambda m: prune.random_unstructured(m, "bias", 0.5), "with a bias that is"),
    "parametrized": (torch.nn.utils.parametrizations.weight_norm, "with a parametrization"),
    "parametrized bias": (
        lambda m: torch.nn.utils.parametrize.register_parametrization(m, "bias", nn.Tanh()),
        "with a parametrization",
    ),
    "own forward": (own_forward, "with a forward of its own"),
    "accelerate": (accelerated, "with a forward of accelerate"),
    "integers": (dtype(torch.int8), "with a weight of dtype int8"),
    "complex": (dtype(torch.complex64), "with a weight of dtype complex64"),
    "eight bits": (dtype(torch.float8_e4m3fn), "with a weight of dtype float8_e4m3fn"),
    "subclass": (subclass, "with a weight of type Tagged"),
    "buffer": (buffer, "with a weight that is computed before every call"),
    "vector": (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(0))), r".* and shape \(0,\)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_layers_that_are_more_than_their_weight_say_why(case: str) -> None:
    change, reason = CASES[case]
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3))
    change(model[0])
    assert list(dense_linears(model)) == ["1"] and list(linears(model)) == ["0", "1"]
    said = why_not_dense(model[0])
    assert said is not None and re.match(reason, said), said


def test_subclasses_say_why_however_plain() -> None:
    for layer in (Doubling(5, 3), nn.LazyLinear(3), nn.modules.linear.NonDynamicallyQuantizableLinear(5, 3)):
        assert (
            why_not_dense(layer) == f"of the class {type(layer).__name__}, which may compute something else"
        )


def test_a_lazy_layer_that_was_called_is_a_plain_one() -> None:
    layer = nn.LazyLinear(3)
    layer(torch.ones(2, 5))
    assert why_not_dense(layer) is None


@pytest.mark.parametrize("wraps", [True, False])
def test_a_forward_that_is_patched_into_the_class_is_seen(
    monkeypatch: pytest.MonkeyPatch, wraps: bool
) -> None:
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return 2 * original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(original)(forward) if wraps else forward)
    assert why_not_dense(nn.Linear(5, 3)) == "with a forward that was patched into nn.Linear"
    monkeypatch.undo()
    assert why_not_dense(nn.Linear(5, 3)) is None


def test_hooks_frozen_weights_and_layers_without_content_are_plain() -> None:
    layer = nn.Linear(5, 3, bias=False).requires_grad_(False)
    layer.register_forward_hook(lambda module, args, y: y * 2)
    for each in (
        layer,
        layer.to("meta"),
        nn.Linear(5, 3, dtype=torch.bfloat16),
        nn.Linear(5, 3, dtype=torch.float64),
    ):
        assert why_not_dense(each) is None
