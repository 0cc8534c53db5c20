"""Compiled models compute what converted ones do, follow their weights, and refuse to train dense ones."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.compiled import TOLERANCE, Block, compiled
from support.models.tiny import MLP, OPTIONS, error_of, factored, randn
from support.strategies import random_factors
from torch import nn
from torch._inductor import compile_fx

from dbf_compile.compiler import backend
from dbf_compile.linear import DoubleBinaryLinear


def test_a_dense_model_and_its_converted_copy_agree_compiled_and_eager():
    model, x = MLP(), randn(5, 67)
    eager = factored(model)(x)
    assert error_of(compiled(model)(x), eager) < TOLERANCE
    assert error_of(torch.compile(factored(model), backend="dbf", fullgraph=True)(x), eager) < TOLERANCE
    assert error_of(eager, model(x)) > 0.01  # it is factored indeed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, x = MLP().to(dtype), randn(5, 67, dtype=dtype)
    y, eager = compiled(model)(x), factored(model)(x)
    assert y.dtype == eager.dtype == dtype
    # One rounding to the dtype at the end of each layer; the compiler may leave out the one in between.
    assert error_of(y, eager) < max(4 * torch.finfo(dtype).eps, 1e-12)


def test_autocast_gives_the_dtype_of_a_dense_layer():
    model, x = MLP(), randn(5, 67)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # The residual x is float32, so look at a layer on its own.
        y = compiled(model.up)(x)
        assert y.dtype == model.up(x).dtype == torch.bfloat16


@pytest.mark.slow
def test_several_batch_sizes_share_factors_and_stay_right(factorized_shapes):
    model = MLP(seed=11)
    run, eager = compiled(model), factored(model)
    factorized_shapes.clear()
    backend.memory.clear()
    for batch in (4, 7, 1, 9):
        x = randn(batch, 67, seed=batch)
        assert error_of(run(x), eager(x)) < TOLERANCE
    assert factorized_shapes == []  # the disk cache had them


@pytest.mark.parametrize("how", ["module.compile()", "torch.compile(module)", "one compiled function"])
def test_instances_that_share_a_graph_use_their_own_weights(how):
    blocks = [Block(seed) for seed in (1, 2, 3)]
    x = randn(4, 70)
    if how == "module.compile()":
        for block in blocks:
            block.compile(backend="dbf", options=OPTIONS)
        calls = blocks
    elif how == "torch.compile(module)":
        calls = [compiled(block) for block in blocks]
    else:
        function = torch.compile(lambda module, x: module(x), backend="dbf", options=OPTIONS)
        calls = [lambda x, block=block: function(block, x) for block in blocks]
    expected = [factored(Block(seed))(x) for seed in (1, 2, 3)]
    for _ in range(2):  # in the second round all factors are cached
        for call, y in zip(calls, expected, strict=True):
            assert error_of(call(x), y) < TOLERANCE


def test_weights_made_under_inference_mode_work():
    with torch.inference_mode():
        model, x = Block(7), randn(4, 70)
        assert error_of(compiled(model)(x), factored(model)(x)) < TOLERANCE


def test_training_through_a_dense_weight_is_refused():
    model, x = MLP().requires_grad_(True), randn(4, 67)
    with pytest.raises(
        Exception, match=r"TrainingError: a gradient wanted for the dense weight of 'up'.*requires_grad"
    ):
        compiled(model)(x)
    with torch.no_grad():
        compiled(model)(x)


def test_training_that_starts_after_compilation_is_refused():
    model, x = MLP(), randn(4, 67)
    run = compiled(model)
    run(x)
    model.up.weight.requires_grad_(True)
    with pytest.raises(Exception, match="gradient wanted for the dense weight"):
        run(x)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dense", "module"])
def test_gradients_of_activations_are_those_of_the_dense_form(way):
    model = MLP()
    converted = factored(model)
    run = compiled(model) if way == "dense" else torch.compile(converted, backend="dbf", fullgraph=True)
    x, weight = randn(5, 67).requires_grad_(), randn(5, 67, seed=1)
    (run(x) * weight).sum().backward()

    dense = [layer.factors.dense(torch.float64) for layer in (converted.up, converted.down)]
    reference = x.detach().double().requires_grad_()
    hidden = F.gelu(F.linear(reference, dense[0], model.up.bias.double()))
    ((reference + F.linear(hidden, dense[1])) * weight.double()).sum().backward()
    assert error_of(x.grad, reference.grad) < TOLERANCE


def test_a_bias_can_be_trained():
    model, x = MLP(), randn(5, 67)
    model.up.bias.requires_grad_(True)
    compiled(model)(x).sum().backward()
    grad, model.up.bias.grad = model.up.bias.grad, None
    converted = factored(model)
    converted(x).sum().backward()
    assert error_of(grad, converted.up.bias.grad) < TOLERANCE


@pytest.mark.parametrize("convert", [False, True], ids=["dense", "converted"])
def test_of_a_models_inputs_only_the_activations_may_move(convert, monkeypatch):
    """What Inductor takes for an input that may be another tensor every time is copied at each replay of a CUDA graph."""
    moving = []
    compile_inner = compile_fx.fx_codegen_and_compile

    def watched(gm, inputs, *args, **settings):
        static = settings["static_input_idxs"]
        moving.append([tuple(x.shape) for index, x in enumerate(inputs) if index not in static])
        return compile_inner(gm, inputs, *args, **settings)

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", watched)
    model = factored(MLP()) if convert else MLP()
    with torch._inductor.config.patch(fx_graph_cache=False):
        compiled(model)(randn(5, 67))
    assert moving == [[(5, 67)]]


@torch.library.custom_op("dbf_test::increase", mutates_args=["x"])
def increase(x: torch.Tensor) -> None:
    x.add_(1)


class Siblings(nn.Module):
    """Two layers that were factored as one, and something that happens to their input in between."""

    def __init__(self, between):
        super().__init__()
        parts = random_factors(67, 40, 50).split([20, 30])
        self.first, self.second = map(DoubleBinaryLinear, parts)
        self.between = between

    def forward(self, x):
        x = x * 1
        first = self.first(x)
        return first, self.between(x), self.second(x)


def checkpointed(function):
    return lambda x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda x: torch.ops.dbf_test.increase(x), id="an operator whose overload is open"),
        pytest.param(lambda x: F.leaky_relu(x, 0.1, True), id="in place by position"),
        pytest.param(lambda x: x.__iadd__(1), id="a method of Python"),
        pytest.param(checkpointed(lambda x: x.add_(1) * 1), id="a subgraph that writes"),
        pytest.param(checkpointed(lambda x: x + 1), id="a subgraph that reads"),
        pytest.param(
            lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,)), id="a condition"
        ),
        pytest.param(lambda x: torch.vmap(lambda row: row * 1 + row.sum())(x), id="vmap"),
    ],
)
@torch.no_grad()
def test_what_happens_between_layers_of_one_input_happens(between):
    model, x = Siblings(between), randn(5, 67)
    for y, expected in zip(compiled(model)(x), model(x), strict=True):
        assert y is expected is None or error_of(y, expected) < TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_layers_within_a_condition_and_under_vmap():
    layer = DoubleBinaryLinear(random_factors(67, 40, 50))
    for function in (
        lambda x: torch.cond(x.sum() > 0, layer, lambda x: layer(x) * 2, (x,)),
        torch.vmap(layer),
    ):
        x = randn(5, 67)
        assert error_of(compiled(function)(x), function(x)) < TOLERANCE


def test_a_model_without_parameters_compiles():
    assert torch.equal(compiled(torch.relu)(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_reset_forgets_the_factors():
    model = MLP()
    compiled(model)(randn(5, 67))
    assert len(backend.memory) > 0
    backend.dbf.reset()
    assert len(backend.memory) == 0


def test_the_memory_of_factors_does_not_keep_weights_alive():
    model = MLP()
    compiled(model)(randn(5, 67))
    weight = weakref.ref(model.up.weight)
    torch.compiler.reset()
    del model
    gc.collect()
    assert weight() is None


class Between(nn.Module):
    """Two layers of one input, and something between them that may write to it."""

    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.act = nn.Linear(64, 64), nn.Linear(64, 64), act
        self.requires_grad_(False).eval()

    def forward(self, x):
        x = x.clone()
        y = self.q_proj(x)
        return self.act(x, y) + self.k_proj(x)


def foreach(x, y):
    torch._foreach_mul_([x, y], [-1.0, 2.0])
    return y


@pytest.mark.parametrize(
    "act",
    [
        lambda x, y: y + 0 * F.relu(input=x, inplace=True),
        lambda x, y: y + 0 * torch.relu_(input=x),
        foreach,
    ],
    ids=["inplace by name", "all by name", "foreach"],
)
def test_a_write_between_two_layers_of_one_input_is_seen(act):
    model, x = Between(act), randn(5, 64)
    assert error_of(compiled(model)(x), factored(model, merge_shared_inputs=False)(x)) < 0.2
