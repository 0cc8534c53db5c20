"""Derivatives and batches of the operators and of a layer are those of the dense layer, whoever asks for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.strategies import random_factors, random_signs
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.signs import interleave, pack_signs

sign_matmul = torch.ops.dbf.sign_matmul
sign_matmul_transposed = torch.ops.dbf.sign_matmul_transposed


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int = 0) -> DoubleBinaryLinear:
    return DoubleBinaryLinear(random_factors(33, 18, 50, seed), nn.Parameter(randn(50, seed=seed))).double()


def dense_layer(seed: int = 0) -> nn.Linear:
    dense = nn.Linear(33, 50, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(random_factors(33, 18, 50, seed).dense(torch.float64))
        dense.bias.copy_(randn(50, seed=seed))
    return dense


def assert_same(result: Any, expected: Any) -> None:
    pairs = list(zip(tree_leaves(result), tree_leaves(expected), strict=True))
    assert pairs
    for value, reference in pairs:
        size = float(reference.detach().abs().sum())
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10 * size)


def energy(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).pow(3).sum()


def dual_tangent(model: nn.Module, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.flip(-1)))).tangent


def energy_of_bias(model: nn.Module, bias: Tensor, x: Tensor) -> Tensor:
    return energy(lambda x: functional_call(model, {"bias": bias}, (x,)))(x)  # type: ignore[arg-type]


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda m, x: vmap(m)(x),
    "vmap over another dimension": lambda m, x: vmap(m, in_dims=1, out_dims=1)(x.T.contiguous()),
    "vmap of vmap": lambda m, x: vmap(vmap(m))(x.view(2, 2, 33)),
    "vmap in chunks": lambda m, x: vmap(m, chunk_size=3)(x),
    "grad": lambda m, x: grad(energy(m))(x),
    "gradients per sample": lambda m, x: vmap(grad(energy(m)))(x),
    "grad of grad": lambda m, x: grad(lambda x: grad(energy(m))(x).square().sum())(x),
    "vjp": lambda m, x: vjp(m, x)[1](randn(4, 50)),
    "jvp": lambda m, x: jvp(m, (x,), (x.flip(-1),)),
    "jvp of grad": lambda m, x: jvp(grad(energy(m)), (x,), (x.flip(-1),)),
    "jvp per sample": lambda m, x: vmap(lambda x: jvp(m, (x,), (x.flip(-1),)))(x),
    "jacrev": lambda m, x: jacrev(m)(x[0]),
    "jacfwd": lambda m, x: jacfwd(m)(x[0]),
    "hessian": lambda m, x: hessian(energy(m))(x[0]),
    "jacrev of jacrev": lambda m, x: jacrev(jacrev(energy(m)))(x[0]),
    "linearize": lambda m, x: linearize(m, x)[1](x.flip(-1)),
    "grad of a bias": lambda m, x: grad(lambda b: energy_of_bias(m, b, x))(m.bias.detach()),
    "per-sample grad of a bias": lambda m, x: vmap(
        grad(lambda b, x: energy_of_bias(m, b, x)), (None, 0)
    )(m.bias.detach(), x),
    "jacfwd of a bias": lambda m, x: jacfwd(lambda b: energy_of_bias(m, b, x))(m.bias.detach()),
    "a dual tensor": dual_tangent,
    "jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x[0], vectorize=True),
    "forward-mode jacobian": lambda m, x: torch.autograd.functional.jacobian(
        m, x[0], vectorize=True, strategy="forward-mode"
    ),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_layer_are_those_of_the_dense_layer(transform: str) -> None:
    x = randn(4, 33)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(torch\.jit|get_attr)")  # of linearize itself
        assert_same(TRANSFORMS[transform](layer(), x), TRANSFORMS[transform](dense_layer(), x))


@pytest.mark.parametrize("tokens", [(), (2,), (0,), (2, 0), (0, 0, 3)])
def test_an_ensemble_of_layers(tokens: tuple[int, ...]) -> None:
    layers, x = [layer(seed) for seed in range(3)], randn(*tokens, 33)
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(layers[0], (parameters, buffers), (x,))
        return y

    assert_same(vmap(call, (0, None))(parameters, x), torch.stack([one(x) for one in layers]))
    each = randn(3, *tokens, 33)
    expected = torch.stack([one(own) for one, own in zip(layers, each, strict=True)])
    assert_same(vmap(call)(parameters, each), expected)


SIGNS = pack_signs(random_signs(20, 33, 0))
TENSORS = {"x": randn(4, 33), "in_scale": randn(33, seed=1), "out_scale": randn(20, seed=2), "bias": randn(20, seed=3)}  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("argument", TENSORS)
def test_every_argument_has_derivatives_of_both_modes(argument: str, interleaved: bool) -> None:
    signs = interleave(SIGNS) if interleaved else SIGNS

    def product(value: Tensor) -> Tensor:
        values = TENSORS | {argument: value}
        y: Tensor = sign_matmul(values.pop("x"), signs, **values, interleaved=interleaved)
        return y

    value = TENSORS[argument].clone().requires_grad_()
    assert torch.autograd.gradcheck(product, (value,), check_forward_ad=True)
    assert_same(jacfwd(product)(value), jacrev(product)(value))


def test_the_transposed_product_has_derivatives_of_both_modes() -> None:
    g = randn(2, 20).requires_grad_()
    product = lambda g: sign_matmul_transposed(g, SIGNS, 33)  # noqa: E731
    assert torch.autograd.gradcheck(product, (g,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, (g,))
    assert_same(vmap(product)(g), product(g))
    stacked = torch.stack([SIGNS, SIGNS.flip(0)])
    each = vmap(lambda g, signs: sign_matmul_transposed(g, signs, 33))(g, stacked)
    assert_same(each, torch.stack([product(g[0]), sign_matmul_transposed(g[1], SIGNS.flip(0), 33)]))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 0), (1, None)])
def test_batches_of_activations_and_of_scales(dims: tuple[int | None, int | None]) -> None:
    x, scale = randn(3, 3, 33), randn(3, 33, seed=1)
    if dims[1] is None:
        scale = scale[0]
    y = vmap(lambda x, scale: sign_matmul(x, SIGNS, scale), dims)(x, scale)
    each = [x] * 3 if dims[0] is None else x.unbind(dims[0])
    scales = [scale] * 3 if dims[1] is None else scale.unbind(0)
    assert_same(y, torch.stack([sign_matmul(a, SIGNS, b) for a, b in zip(each, scales, strict=True)]))


def test_the_tangent_has_the_dtype_of_the_result() -> None:
    x = randn(4, 33).bfloat16()
    y, tangent = jvp(lambda x: sign_matmul(x, SIGNS, dtype=torch.bfloat16), (x,), (x,))
    assert y.dtype == tangent.dtype == torch.bfloat16
    assert torch.equal(tangent, y)
