"""DoubleBinaryLinear and the swap of dense layers for it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import double_binary_factors, random_factors, sizes
from torch import Tensor, nn

from dbf_compile.errors import ConversionError, KernelInputError
from dbf_compile.factors import TENSOR_NAMES, DoubleBinaryFactors
from dbf_compile.linear import DoubleBinaryLinear, dense_linears, dense_weight, swap_
from dbf_compile.signs import interleave
from dbf_compile.testing import assert_close


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is [K, N]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Doubling(nn.Linear):
    """A subclass that computes something else than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Block(nn.Module):
    """A model with layers of every kind, one of them under two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(33, 37)
        self.layers = nn.ModuleList([nn.Sequential(Conv1D(65, 37), nn.GELU()), nn.Linear(65, 33, bias=False)])
        self.special = Doubling(33, 33)
        self.tied = nn.ModuleDict({"up": self.up})

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](self.up(x)))
        return self.tied["up"](self.special(x))


def set_weight_(layer: nn.Module, weight: Tensor) -> None:
    """Give a dense layer of either kind the weight [N, K]."""
    with torch.no_grad():
        dense_weight(layer).copy_(weight)


def factors_for(model: nn.Module) -> dict[str, DoubleBinaryFactors]:
    """Return factors for all layers of ``model``, and give these layers the weights that they stand for."""
    factors = {}
    for seed, (name, layer) in enumerate(dense_linears(model).items()):
        out_features, in_features = dense_weight(layer).shape
        factors[name] = random_factors(in_features, 7, out_features, seed)
        set_weight_(layer, factors[name].dense())
    return factors


def x_for(features: int, *leading: int) -> Tensor:
    return torch.randn(*leading, features, generator=torch.Generator().manual_seed(0))


def test_dense_layers_are_found_once_each_and_subclasses_left_out() -> None:
    model = Block()
    assert list(dense_linears(model)) == ["up", "layers.0.0", "layers.1"]
    assert dense_weight(model.layers[0][0]).shape == (65, 37)
    assert list(dense_linears(nn.Linear(2, 3))) == [""]
    assert not dense_linears(nn.Sequential(nn.Conv1d(3, 3, 1), nn.GELU()))


def test_parametrized_layers_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    assert not dense_linears(model)


def test_a_swapped_model_computes_the_same() -> None:
    model = Block().double()
    factors = factors_for(model)
    for name, layer in dense_linears(model).items():
        set_weight_(layer, factors[name].dense(torch.float64))
    x = x_for(33, 2, 5).double()
    dense = model(x)
    assert swap_(model, factors) is model
    assert {type(model.up), type(model.layers[0][0]), type(model.layers[1])} == {DoubleBinaryLinear}
    assert type(model.special) is Doubling
    # float64 on both sides, some hundred roundings of 1.1e-16 in each of five layers, and cancellation in their sums.
    assert_close(model(x), dense, rtol=1e-11)


def test_a_layer_under_two_parents_stays_one_layer() -> None:
    model = Block()
    swap_(model, factors_for(model))
    assert model.tied["up"] is model.up


def test_only_the_named_layers_are_swapped() -> None:
    model = Block()
    up, conv = model.up, model.layers[0][0]
    swap_(model, {"layers.1": random_factors(65, 7, 33)})
    assert model.up is up and model.layers[0][0] is conv
    assert type(model.layers[1]) is DoubleBinaryLinear
    assert swap_(model, {}) is model


def test_a_bare_linear_is_returned_anew() -> None:
    dense = nn.Linear(33, 37)
    layer = swap_(dense, {"": random_factors(33, 5, 37)})
    assert isinstance(layer, DoubleBinaryLinear) and layer.bias is dense.bias


def test_bias_and_mode_are_kept() -> None:
    model = Block().eval()
    bias = model.up.bias
    model.layers[1].train()
    swap_(model, factors_for(model))
    assert model.up.bias is bias and model.layers[1].bias is None
    assert not model.up.training and model.layers[1].training


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("absent", (33, 37), "which is no dense linear layer of Block; allowed: layers.0.0, layers.1, up"),
        ("special", (33, 33), "factors for 'special', a layer of the class Doubling"),
        ("tied.up", (33, 37), "factors for 'tied.up'"),
        ("layers.0", (37, 65), "factors for 'layers.0'"),
        ("up", (37, 33), r"factors of shape \(33, 37\) for 'up'; allowed: \(37, 33\)"),
        ("layers.0.0", (65, 37), r"factors of shape \(37, 65\) for 'layers.0.0'; allowed: \(65, 37\)"),
    ],
)
def test_nothing_is_replaced_on_an_error(name: str, sizes: tuple[int, int], message: str) -> None:
    model = Block()
    before = dict(model.named_modules())
    factors = {**factors_for(model), name: random_factors(sizes[0], 5, sizes[1])}
    with pytest.raises(ConversionError, match=message):
        swap_(model, factors)
    after = dict(model.named_modules())
    assert list(before) == list(after) and all(before[n] is after[n] for n in before)


def test_a_model_without_linear_layers_says_so() -> None:
    with pytest.raises(ConversionError, match="none: the model has no dense linear layer"):
        swap_(nn.GELU(), {"up": random_factors(3, 3, 3)})


@given(double_binary_factors(), st.booleans())
def test_the_state_comes_back(factors: DoubleBinaryFactors, with_bias: bool) -> None:
    bias = torch.randn(factors.out_features) if with_bias else None
    layer = DoubleBinaryLinear(factors, bias)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == {*TENSOR_NAMES, *(["bias"] if with_bias else [])}

    sizes = factors.in_features, factors.mid_features, factors.out_features
    other = DoubleBinaryLinear(
        random_factors(*sizes, 99, factors.scale_in.dtype), None if bias is None else bias * 0
    )
    other.load_state_dict(state)
    x = x_for(factors.in_features, 3)
    assert torch.equal(layer(x), other(x))
    assert (other.in_features, other.mid_features, other.out_features) == sizes


def test_a_state_of_other_sizes_is_refused() -> None:
    layer = DoubleBinaryLinear(random_factors(33, 5, 3))
    with pytest.raises(RuntimeError, match="size mismatch for signs_in"):
        layer.load_state_dict(DoubleBinaryLinear(random_factors(65, 5, 3)).state_dict())


def test_only_the_bias_is_trained() -> None:
    bias = nn.Parameter(torch.zeros(3))
    layer = DoubleBinaryLinear(random_factors(33, 5, 3), bias)
    assert [parameter for parameter in layer.parameters() if parameter.requires_grad] == [bias]
    assert {name for name, _ in layer.named_parameters()} == {*TENSOR_NAMES, "bias"}
    assert next(DoubleBinaryLinear(random_factors(33, 5, 3)).parameters()).is_floating_point()
    assert not DoubleBinaryLinear(random_factors(33, 5, 3), torch.zeros(3)).bias.requires_grad


def test_the_factors_come_out_as_they_went_in() -> None:
    factors = random_factors(33, 5, 3)
    again = DoubleBinaryLinear(factors).factors
    assert all(torch.equal(getattr(again, name), getattr(factors, name)) for name in TENSOR_NAMES)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_signs_are_interleaved_on_every_device_and_in_the_state(device: str) -> None:
    factors = random_factors(33, 37, 50)
    layer = DoubleBinaryLinear(factors)
    assert torch.equal(layer.signs_in, interleave(factors.signs_in))
    assert layer.state_dict()["signs_out"].data_ptr() == layer.signs_out.data_ptr()
    again = copy.deepcopy(layer).to("meta").to(device) if device == "meta" else copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again(x_for(33)), layer(x_for(33)))


@given(double_binary_factors(), st.sampled_from(["copy", "assign", "functional", "in place"]))
def test_the_state_is_what_forward_reads(factors: DoubleBinaryFactors, way: str) -> None:
    layer = DoubleBinaryLinear(factors)
    sizes = factors.in_features, factors.mid_features, factors.out_features
    other = DoubleBinaryLinear(random_factors(*sizes, 99, factors.scale_in.dtype))
    x = x_for(factors.in_features, 3)
    if way == "functional":
        y = torch.func.functional_call(other, layer.state_dict(), (x,))
    else:
        if way == "in place":
            for name, tensor in layer.state_dict().items():
                other.state_dict()[name].copy_(tensor)
        else:
            other.load_state_dict(layer.state_dict(), assign=way == "assign")
        y = other(x)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_shared_first_stage_is_in_the_state_of_every_layer(device: str) -> None:
    expected, model = sharing(1), sharing().to(device)
    state = expected.state_dict()
    assert state["0.signs_in"].data_ptr() == state["1.signs_in"].data_ptr()
    model.load_state_dict(state, assign=True)
    for layer, other in zip(model, expected, strict=True):
        assert torch.equal(layer(x_for(33)), other(x_for(33)))
    assert model[0].signs_in.data_ptr() == model[1].signs_in.data_ptr()


def sharing(seed: int = 0) -> nn.Sequential:
    """Return two layers of 33 inputs that share their first stage."""
    model = nn.Sequential(nn.Linear(33, 20, bias=False), nn.Linear(33, 30, bias=False))
    return swap_(model, dict(zip("01", random_factors(33, 37, 50, seed).split([20, 30]), strict=True)))


def test_layers_that_share_a_first_stage_hold_the_same_parameters() -> None:
    one, other = sharing()
    assert one.signs_in is other.signs_in
    assert one.scale_in is other.scale_in


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda model: model.half().double(), id="other dtypes"),
        pytest.param(copy.deepcopy, id="a copy"),
        pytest.param(lambda model: model.share_memory(), id="another process"),
    ],
)
def test_layers_go_on_sharing_a_first_stage_where_the_model_goes(
    move: Callable[[nn.Module], nn.Module],
) -> None:
    one, other = move(sharing())
    for name in ("signs_in", "scale_in", "scale_mid"):
        assert getattr(one, name) is getattr(other, name)


def test_the_bias_is_trained() -> None:
    layer = DoubleBinaryLinear(random_factors(33, 5, 3), nn.Parameter(torch.zeros(3)))
    layer(x_for(33, 7)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 7.0))


def both(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return a dense layer of ``dtype`` and a factored one of the same sizes."""
    dense = nn.Linear(33, 3, dtype=dtype)
    return dense, DoubleBinaryLinear(random_factors(33, 5, 3), dense.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_that_of_a_dense_layer(dtype: torch.dtype) -> None:
    dense, layer = both(dtype)
    x = x_for(33, 2).to(dtype)
    assert layer(x).dtype == dense(x).dtype == dtype
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", autocast):
            assert layer(x).dtype == dense(x).dtype
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == dtype


def test_without_data_there_are_still_shapes() -> None:
    layer = DoubleBinaryLinear(random_factors(33, 5, 3)).to("meta")
    y = layer(torch.ones(2, 33, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3), torch.bfloat16, "meta")


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: m.double(), lambda m: m.bfloat16()])
def test_the_layer_moves_like_any_module(change: Callable[[nn.Module], nn.Module]) -> None:
    layer = DoubleBinaryLinear(random_factors(33, 5, 3), torch.zeros(3))
    x = x_for(33, 4)
    y = layer(x)
    moved = change(copy.deepcopy(layer))
    assert torch.equal(moved.signs_in, layer.signs_in)
    # bfloat16 scales are off by up to 2^-9 each, three of them in every term; terms of either sign may cancel.
    size = x.abs().double() @ layer.factors.dense(torch.float64).abs().T
    assert_close(moved(x).double(), y.double(), bound=4 * 2.0**-9 * size.max())


@pytest.mark.parametrize("features", [1, 32, 34])
def test_inputs_of_other_sizes_are_refused(features: int) -> None:
    with pytest.raises(KernelInputError, match="in_features=33"):
        DoubleBinaryLinear(random_factors(33, 5, 3))(torch.ones(2, features))


@given(sizes, sizes, sizes)
def test_the_sizes_are_shown(k: int, r: int, n: int) -> None:
    layer = DoubleBinaryLinear(random_factors(k, r, n))
    assert (
        repr(layer) == f"DoubleBinaryLinear(in_features={k}, mid_features={r}, out_features={n}, bias=False)"
    )
