"""Transforms of torch.func and dual tensors around compiled code: factors are used, tangents kept, and later calls compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compiled import TOLERANCE
from support.models.tiny import MLP, OPTIONS, error_of, factored, randn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

from dbf_compile.compiler import inductor


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that has an entry for every graph that Inductor compiled."""
    seen: list[int] = []
    original = inductor.compile_graph

    def compile_graph(*args: Any) -> Any:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(inductor, "compile_graph", compile_graph)
    return seen


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="dbf", options=OPTIONS)


def energy(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).pow(3).sum()


def assert_same(results: Any, expected: Any) -> None:
    for value, reference in zip(results, expected, strict=True):
        assert error_of(value, reference) < TOLERANCE


AROUND: dict[str, Callable[[Any, Tensor], tuple[Tensor, ...]]] = {
    "vmap": lambda m, x: (vmap(m)(x), vmap(vmap(m))(x[None])),
    "vjp": lambda m, x: vjp(m, x)[1](x),
    "gradients per sample": lambda m, x: (vmap(grad(energy(m)))(x), grad(energy(m))(x)),
    "jacrev": lambda m, x: (jacrev(m)(x[0]),),
}


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["first", "after a plain call"])
@pytest.mark.parametrize("transform", AROUND)
def test_a_transform_around_a_compiled_model_uses_the_factors(transform: str, first: bool) -> None:
    model, x = MLP(), randn(4, 67)
    run, eager = compiled(model), factored(model)
    if not first:
        run(x)
    assert_same(AROUND[transform](run, x), AROUND[transform](eager, x))
    assert error_of(run(x), eager(x)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("convert", [False, True], ids=["dense", "converted"])
def test_dual_tensors_keep_their_tangents(convert: bool) -> None:
    model, x, tangent = MLP(), randn(4, 67), randn(4, 67, seed=1)
    eager = factored(model)
    run = compiled(eager if convert else model)
    for _ in range(2):  # compiled within the level, and before
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            results, expected = (forward_ad.unpack_dual(call(dual)) for call in (run, eager))
        assert_same(results, expected)
        assert error_of(run(x), eager(x)) < TOLERANCE


@pytest.mark.slow
def test_within_jvp_dense_weights_are_refused_and_factored_layers_run(compilations: list[int]) -> None:
    model, x = MLP(), randn(4, 67)
    eager = factored(model)
    for call in (compiled(model), torch.compile(lambda x: model(x), backend="dbf", options=OPTIONS)):
        with pytest.raises(Exception, match="dense weights would be used"):
            jvp(call, (x,), (x,))
        assert error_of(call(x), eager(x)) < TOLERANCE
    run = compiled(eager)
    assert_same(jvp(run, (x,), (x,)), jvp(eager, (x,), (x,)))
    assert_same((hessian(energy(run))(x[0]),), (hessian(energy(eager))(x[0]),))
    before = len(compilations)
    run(x)
    assert len(compilations) == before + 1  # Dynamo would never again try


@pytest.mark.slow
def test_weights_that_a_transform_wraps_stay_dense() -> None:
    models, x = [MLP(seed=seed) for seed in range(3)], randn(4, 67)
    run = compiled(MLP())
    stacked, _ = stack_module_state(models)
    own = {f"_orig_mod.{name}": value for name, value in stacked.items()}
    y = vmap(lambda values, x: functional_call(run, values, (x,)), (0, None))(own, x)
    assert_same(y, [model(x) for model in models])


@pytest.mark.slow
def test_another_backend_is_refused_as_ever() -> None:
    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model, x = MLP(), randn(4, 67)
    assert_same(vmap(torch.compile(model, backend=backend))(x), vmap(model)(x))
    assert not graphs
