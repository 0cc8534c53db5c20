"""Stand-ins for a dense layer: looking at the weight gives what the dense weight would give, using it is an error."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.strategies import random_factors
from torch import Tensor, nn

from dbf_compile.compression.training import TrainableDoubleBinary, TrainableScales
from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.factors import TENSOR_NAMES
from dbf_compile.linear import DoubleBinaryLinear, is_conv1d, replace_everywhere
from dbf_compile.stand_in import LOOKS, FactoredWeight, StandIn
from dbf_compile.tables import QuantizedRows, table_layer

K, R, N = 33, 5, 7
FACTORS = random_factors(K, R, N)
SURE = (torch.ones(R, K), torch.ones(N, R))
KINDS: dict[str, Callable[[], StandIn]] = {
    "factored": lambda: DoubleBinaryLinear(FACTORS),
    "signs": lambda: TrainableDoubleBinary(FACTORS, SURE),
    "scales": lambda: TrainableScales(FACTORS),
}


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = N, nn.Parameter(torch.ones(K, N)), nn.Parameter(torch.zeros(N))


def in_place_of(dense: nn.Module, kind: str = "factored") -> StandIn:
    model = nn.Sequential(dense)
    replace_everywhere(model, dense, KINDS[kind]())
    layer: Any = model[0]
    return layer


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def look(weight: Tensor, name: str) -> Any:
    value = getattr(weight, name)
    return value() if callable(value) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [lambda: nn.Linear(K, N), Conv1D])
def test_whoever_looks_sees_the_dense_weight(kind: str, make: Callable[[], nn.Module], dtype: torch.dtype):
    dense = make().to(dtype).requires_grad_(False)
    layer = in_place_of(dense, kind)
    assert isinstance(layer.weight, Tensor) and layer.transposed == is_conv1d(dense)
    for name in LOOKS:
        assert look(layer.weight, name) == look(dense.weight, name), name
    for move in (nn.Module.half, nn.Module.double, lambda module: module.to("meta")):
        move(dense), move(layer)
        for name in ("dtype", "device", "is_meta", "shape"):
            assert look(layer.weight, name) == look(dense.weight, name), name


def test_tensors_like_it_and_tensors_cast_to_it_are_plain(kind: str) -> None:
    weight = in_place_of(nn.Linear(K, N, dtype=torch.float64), kind).weight
    x = torch.ones(3)
    for like in (torch.zeros_like(weight), weight.new_ones(N, K), torch.zeros_like(weight, device="cpu")):
        assert type(like) is Tensor and like.shape == (N, K) and like.dtype == torch.float64
    assert x.to(weight).dtype == x.type_as(weight).dtype == weight.data.dtype == weight.detach().dtype
    assert torch.is_floating_point(weight) and torch.numel(weight) == N * K
    weight.requires_grad = False
    assert weight.requires_grad_(False) is weight
    assert repr(weight) == "FactoredWeight(shape=(7, 33), dtype=torch.float64, device='cpu')" == f"{weight}"


USES: dict[str, Callable[[Any], object]] = {
    "linear": lambda w: nn.functional.linear(torch.ones(K), w),
    "product": lambda w: torch.ones(K) @ w.T,
    "embedding": lambda w: nn.functional.embedding(torch.tensor([1]), w),
    "sum": lambda w: w + 1,
    "index": lambda w: w[0],
    "cast": lambda w: w.to(torch.float64),
    "list": lambda w: w.tolist(),
    "array": lambda w: w.numpy(),
    "truth": bool,
    "copy": lambda w: w.copy_(torch.ones(N, K)),
    "out": lambda w: torch.add(torch.ones(N, K), 1, out=w),
    "data": lambda w: setattr(w, "data", torch.ones(N, K)),
    "initialization": lambda w: nn.init.normal_(w),
    "training": lambda w: w.requires_grad_(True),
    "parameter": lambda w: nn.Parameter(w),
    "address": lambda w: w.data_ptr(),
    "saving": lambda w: torch.save(w, io.BytesIO()),
    "stack": lambda w: torch.cat([w, torch.ones(1, K)]),
    "below torch functions": lambda w: torch.ops.aten.relu(w),
}


@pytest.mark.parametrize("use", USES)
def test_whoever_uses_values_is_told_the_way_out(kind: str, use: str) -> None:
    with pytest.raises(
        ConversionError,
        match=r"the weight of a factored layer or a quantized table in .*; allowed: its dtype.*skip=",
    ):
        USES[use](KINDS[kind]().weight)


def test_no_weight_can_be_set(kind: str) -> None:
    for value in (nn.Parameter(torch.ones(N, K)), torch.ones(N, K), None):
        with pytest.raises(ConversionError, match="a weight for a factored layer"):
            KINDS[kind]().weight = value


class Looking(nn.Module):
    """Casts to the dtype of the weight of its layer, as T5 does, or reads its values."""

    def __init__(self, layer: nn.Module, reads: bool = False) -> None:
        super().__init__()
        self.wo, self.reads = layer, reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            return nn.functional.linear(x, self.wo.weight)
        weight = self.wo.weight
        if (
            isinstance(weight, Tensor)
            and weight.dtype != x.dtype
            and weight.size(0) == N
            and weight.is_contiguous()
        ):
            x = x.to(weight.dtype)
        return self.wo(x) + torch.zeros_like(weight)[:, 0]


def test_compiled_code_looks_without_a_graph_break_and_is_told_too() -> None:
    layer, x = in_place_of(nn.Linear(K, N)), torch.randn(3, K, dtype=torch.float64)
    compiled = torch.compile(Looking(layer), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), Looking(layer)(x)) and compiled(x).dtype == torch.float32
    with pytest.raises(ConversionError, match="a quantized table in linear"):
        torch.compile(Looking(layer, reads=True), backend="eager")(x.float())
    exported = torch.export.export(Looking(layer), (x,), strict=False).module()
    assert torch.equal(exported(x), compiled(x))


def test_nothing_of_the_weight_is_in_the_state() -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    replace_everywhere(model, model[0], DoubleBinaryLinear(FACTORS))
    assert not any(isinstance(value, FactoredWeight) for value in vars(model[0]).values())
    assert set(model[0].state_dict()) == set(TENSOR_NAMES)
    file = io.BytesIO()
    torch.save(model.bfloat16(), file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other[0].weight.dtype == torch.bfloat16
        other.load_state_dict(model.state_dict())


def test_hooks_mode_and_what_was_attached_are_taken_over(kind: str) -> None:
    dense, calls = nn.Linear(K, N), list[str]()
    dense.register_buffer("factor", torch.tensor(3.0))
    dense.tag = "mine"
    hooks = [
        dense.register_forward_pre_hook(lambda m, args: calls.append("before")),
        dense.register_forward_hook(lambda m, args, kwargs, y: y * m.factor, with_kwargs=True),
        dense.register_full_backward_hook(lambda m, into, out: calls.append("backward")),
        dense.register_state_dict_post_hook(lambda *_: calls.append("saved")),
        dense.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
        dense._register_load_state_dict_pre_hook(
            lambda m, *_: calls.append(type(m).__name__), with_module=True
        ),
    ]
    layer = in_place_of(dense.eval(), kind)
    del dense
    x = torch.ones(2, K, requires_grad=True)
    plain = KINDS[kind]()(x)
    assert torch.equal(layer(x), 3 * plain) and not layer.training and layer.tag == "mine"
    layer(x).sum().backward()
    state = layer.state_dict()
    layer.load_state_dict(state)
    assert (
        calls == ["before", "before", "backward", "saved", type(layer).__name__, "loaded"]
        and "factor" in state
    )
    again = in_place_of(layer, "factored")
    assert again.tag == "mine" and float(again.factor) == 3 and not hasattr(again, "latent_in")
    for hook in hooks:
        hook.remove()
    assert torch.equal(layer(x), plain)


def test_dense_weights_that_are_not_loaded_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(DoubleBinaryLinear(random_factors(33, 18, 50)))
    model.load_state_dict({"0.weight": torch.ones(50, 33)}, strict=False)
    (message,) = caplog.messages
    assert "the dense weight 0.weight is not loaded" in message
    caplog.clear()
    model.load_state_dict({"0.weight": torch.empty(50, 0)} | model.state_dict(), strict=False)
    assert not caplog.messages


TABLE = QuantizedRows.of(torch.ones(N, K), "int8")
OF_WORDS: dict[str, Callable[[], nn.Module]] = {
    "factors": KINDS["factored"],
    "a head": lambda: table_layer(nn.Linear(K, N), TABLE),
    "an embedding": lambda: table_layer(nn.Embedding(N, K), TABLE),
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": Tensor.half,
    "as other integers": Tensor.long,
    "averaged": lambda words: 0.9 * words + 0.1 * words,
}


@pytest.mark.parametrize("layer", OF_WORDS)
@pytest.mark.parametrize("change", CHANGES)
def test_states_of_words_that_were_changed_are_refused(layer: str, change: str) -> None:
    model = nn.Sequential(OF_WORDS[layer]())
    before = copy.deepcopy(model.state_dict())
    state = {key: v if v.is_floating_point() else CHANGES[change](v) for key, v in before.items()}
    for assign in (False, True):
        with pytest.raises(
            CheckpointError, match=r"0\.(signs_in|rows) of dtype .* in a state; allowed: torch\.int32"
        ):
            model.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict({key: v.double() if v.is_floating_point() else v for key, v in before.items()})


@pytest.mark.parametrize("layer", OF_WORDS)
def test_scripts_are_refused_and_traces_compute_the_same(layer: str) -> None:
    model = nn.Sequential(OF_WORDS[layer]())
    x = torch.tensor([1, 5]) if layer == "an embedding" else torch.ones(2, K)
    with pytest.raises(ConversionError, match=r"torch\.jit\.script of a model with .*torch\.export"):
        torch.jit.script(model)
    with torch.no_grad():
        if layer == "an embedding":
            with pytest.raises(ConversionError, match=r"torch\.jit\.trace of an embedding .*torch\.export"):
                torch.jit.trace(model, (x,))
        else:
            assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_the_weight_of_a_sharded_table_is_the_parameter() -> None:
    class Sharded(Tensor):
        pass

    layer: Any = OF_WORDS["a head"]()
    layer.weight = nn.Parameter(torch.empty(N, 0).as_subclass(Sharded))
    assert layer.weight is layer._parameters["weight"]
