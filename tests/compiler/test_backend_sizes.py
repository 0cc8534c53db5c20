"""Sizes: symbols with a known value, empty batches, batches of torch.func, nested tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compiled import TOLERANCE
from support.models.tiny import MLP, OPTIONS, error_of, factored, randn
from torch import Tensor, nn
from torch.func import grad, jvp, vmap


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(function, backend="dbf", fullgraph=True, dynamic=dynamic, options=OPTIONS)


class Shapes(nn.Module):
    """Layers whose feature sizes Dynamo computes from the sizes of x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product, self.left = nn.Linear(60, 40), nn.Linear(20, 70)
        self.joined, self.argument = nn.Linear(90, 50), nn.Linear(25, 60)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, features: int) -> Tensor:
        y = torch.relu(self.product(x.flatten(-2)))
        left, right = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
        joined = self.joined(torch.cat([self.left(left), right], -1))
        z: Tensor = self.argument(joined.reshape(-1, features))
        return z.view(x.shape[0], -1)


@pytest.mark.slow
@pytest.mark.parametrize("static_parameters", [True, False], ids=["", "symbolic weights"])
def test_feature_sizes_that_are_symbols_with_a_value(static_parameters: bool) -> None:
    model = Shapes()
    run, eager = compiled(model, dynamic=True), factored(model)
    with torch._dynamo.config.patch(
        force_parameter_static_shapes=static_parameters,
        force_nn_module_property_static_shapes=static_parameters,
    ):
        for x, features in ((randn(3, 4, 15), 25), (randn(2, 4, 15), 25), (randn(5, 6, 10), 25)):
            assert error_of(run(x, features), eager(x, features)) < TOLERANCE


@pytest.mark.slow
def test_one_class_at_two_widths() -> None:
    # The second width is a symbol, as are sizes behind the graph break.
    def run(x: Tensor, model: nn.Module) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        result: Tensor = model(y)
        return result

    step = torch.compile(run, backend="dbf", options=OPTIONS)
    for width in (67, 96):
        model, x = MLP(width), randn(5, width)
        assert error_of(step(x, model), factored(model)(x + 1)) < TOLERANCE


@pytest.mark.slow
def test_a_feature_size_that_depends_on_data() -> None:
    model, x = nn.Sequential(nn.Linear(64, 70)).requires_grad_(False), randn(3, 70)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = compiled(lambda x, n: model(x[:, : n.item()]))
        assert error_of(run(x, torch.tensor(64)), factored(model)(x[:, :64])) < TOLERANCE
        with pytest.raises(Exception, match=r"u\d|64"):
            run(x, torch.tensor(63))


class Attention(nn.Module):
    """Siblings, and a layer that reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(64, 40), nn.Linear(64, 24, bias=False)
        self.o_proj = nn.Linear(40, 64)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.o_proj(self.q_proj(x)), self.k_proj(x)


EMPTY = [(0, 64), (2, 0, 64), (0, 0, 64), (0, 3, 64), (2, 0, 3, 64), (64,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("convert", "dynamic"), [(False, True), (True, False)], ids=["dense, dynamic", "converted"]
)
def test_batches_of_every_rank_may_be_empty(convert: bool, dynamic: bool) -> None:
    model = factored(Attention()) if convert else Attention()
    eager = model if convert else factored(model)

    def results(run: Callable[..., list[Tensor]]) -> list[Tensor]:
        inputs = [randn(*shape).requires_grad_() for shape in EMPTY]
        outputs = run(*inputs)
        torch.autograd.backward([y.sum() for y in outputs])
        return [*outputs, *(x.grad for x in inputs)]  # type: ignore[list-item]

    run = compiled(lambda *inputs: [y for x in inputs for y in model(x)], dynamic=dynamic)
    expected_results = results(lambda *inputs: [y for x in inputs for y in eager(x)])
    for value, expected in zip(results(run), expected_results, strict=True):
        assert value.shape == expected.shape
        assert value.numel() == 0 or error_of(value, expected) < TOLERANCE


def transforms(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, ...]:
    def energy(x: Tensor) -> Tensor:
        return model(x).square().sum()

    return (
        vmap(model)(x),
        vmap(model, in_dims=1, out_dims=1)(x.T),
        vmap(vmap(model))(x[None]),
        vmap(grad(energy))(x),
        *jvp(model, (x,), (x.flip(-1),)),
        jvp(grad(energy), (x,), (x,))[1],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("convert", "dynamic"), [(False, True), (True, False)], ids=["dense, dynamic", "converted"]
)
def test_transforms_of_torch_func(convert: bool, dynamic: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, x = MLP(), randn(4, 67)
    eager = factored(model)
    inner = eager if convert else model
    run = compiled(lambda x: transforms(inner, x), dynamic=dynamic)
    with caplog.at_level(logging.INFO, logger="dbf_compile.compiler.backend"):
        results = run(x)
    *_, record = (record for record in caplog.records if record.msg.startswith("rewrites"))
    assert record.args["replace_linears"] == (0 if convert else 12)  # type: ignore[index,call-overload]
    for value, expected in zip(results, transforms(eager, x), strict=True):
        # Second derivatives sum twice as many products.
        assert error_of(value, expected) < 4 * TOLERANCE


@pytest.mark.slow
def test_per_sample_gradients_with_respect_to_dense_weights_are_those_of_the_dense_model() -> None:
    model, x = MLP(), randn(4, 67)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()  # type: ignore[no-any-return]

    parameters = dict(model.named_parameters())
    gradients = vmap(grad(loss), (None, 0))
    results = compiled(gradients)(parameters, x)
    for name, expected in gradients(parameters, x).items():
        assert error_of(results[name], expected) < TOLERANCE


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_go_through_factored_layers(layout: torch.layout) -> None:
    model = factored(nn.Sequential(nn.Linear(67, 130), nn.GELU(), nn.Linear(130, 67)))
    parts = [randn(3, 67), randn(5, 67, seed=1)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = model(x)
    assert y.layout == layout
    for part, expected in zip(y.unbind(), map(model, parts), strict=True):
        assert error_of(part, expected) < TOLERANCE
    sum(part.sum() for part in y.unbind()).backward()
    assert x.grad is not None


@pytest.mark.slow
def test_a_dense_model_of_nested_tensors_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(67, 130), nn.GELU(), nn.Linear(130, 67)).requires_grad_(False)
    x = torch.nested.nested_tensor([randn(3, 67), randn(5, 67, seed=1)], layout=torch.jagged)
    for run, expected in ((compiled(model), model), (compiled(factored(model)), factored(model))):
        assert error_of(run(x).values(), expected(x).values()) < TOLERANCE
