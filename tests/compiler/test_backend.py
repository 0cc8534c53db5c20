import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.models.tiny import MLP, OPTIONS, error_of, factored, randn
from support.strategies import random_factors
from torch import nn
from torch._inductor import compile_fx
from torch._inductor.utils import run_and_get_code

import dbf_compile
from dbf_compile.compiler import backend
from dbf_compile.compression import jobs
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.linear import DoubleBinaryLinear

# float32 sums of at most 200 products, in the order of another kernel: 200 · 2^-24 is 1.2e-5 of the largest term.
TOLERANCE = 2e-5


def compiled(model, **options):
    return torch.compile(model, backend="dbf", fullgraph=True, options={**OPTIONS, **options})


@pytest.fixture
def count_factorizations(monkeypatch):
    """Count calls of the factorizer, and leave it out of reach of the disk cache."""
    made = []
    original = jobs.factorize_batch

    def factorize_batch(weights, *args, **kwargs):
        made.extend(tuple(weight.shape) for weight in weights)
        return original(weights, *args, **kwargs)

    monkeypatch.setattr(jobs, "factorize_batch", factorize_batch)
    return made


class Block(nn.Module):
    def __init__(self, seed, size=70):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.linear.weight.data = randn(size, size, seed=seed)
        self.requires_grad_(False)

    def forward(self, x):
        return torch.relu(self.linear(x))


def test_a_dense_model_and_its_converted_copy_agree_compiled_and_eager():
    model, x = MLP(), randn(5, 67)
    eager = factored(model)(x)
    assert error_of(compiled(model)(x), eager) < TOLERANCE
    assert error_of(torch.compile(factored(model), backend="dbf", fullgraph=True)(x), eager) < TOLERANCE
    assert error_of(eager, model(x)) > 0.01  # it is factored indeed


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


def test_several_batch_sizes_share_factors_and_stay_right(count_factorizations):
    model = MLP(seed=11)
    run, eager = compiled(model), factored(model)
    count_factorizations.clear()
    backend._factored.clear()
    for batch in (4, 7, 1, 9):
        x = randn(batch, 67, seed=batch)
        assert error_of(run(x), eager(x)) < TOLERANCE
    assert count_factorizations == []  # the disk cache had them


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
    for _ in range(2):  # a second round finds all factors made
        for call, wanted in zip(calls, expected, strict=True):
            assert error_of(call(x), wanted) < TOLERANCE


def test_a_weight_changed_in_place_is_factored_again(caplog):
    model, x = Block(4), randn(4, 70)
    run = compiled(model)
    run(x)
    model.linear.weight.mul_(torch.linspace(-2, 2, 70))
    with caplog.at_level(logging.WARNING, logger="dbf_compile"):
        assert error_of(run(x), factored(model)(x)) < TOLERANCE
    assert "another one than at compilation" in caplog.text


def test_a_weight_whose_memory_was_exchanged_is_factored_again():
    model, x = Block(5), randn(4, 70)
    run = compiled(model)
    run(x)
    model.linear.weight.data = randn(70, 70, seed=99)
    assert error_of(run(x), factored(model)(x)) < TOLERANCE


def test_a_weight_that_was_replaced_is_factored_again():
    model, x = Block(6), randn(4, 70)
    run = compiled(model)
    run(x)
    model.load_state_dict({"linear.weight": randn(70, 70, seed=98)}, assign=True)
    model.requires_grad_(False)
    assert error_of(run(x), factored(model)(x)) < TOLERANCE


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


def rewrites(caplog, model, x, **options):
    with caplog.at_level(logging.INFO, logger="dbf_compile.compiler.backend"):
        caplog.clear()
        torch.compiler.reset()
        compiled(model, **options)(x)
    (record,) = (record for record in caplog.records if record.msg.startswith("rewrites"))
    return record.args


def test_skipped_and_too_small_layers_stay_dense(caplog):
    model, x = MLP(), randn(5, 67)
    assert rewrites(caplog, model, x)["replace_linears"] == 2
    assert rewrites(caplog, model, x, skip=["up"])["replace_linears"] == 1
    assert rewrites(caplog, model, x, skip=["*"])["replace_linears"] == 0
    assert (
        rewrites(caplog, nn.Sequential(nn.Linear(4, 3)).requires_grad_(False), randn(5, 4))["replace_linears"]
        == 0
    )


def test_overrides_set_bits_by_layer_name(count_factorizations, monkeypatch):
    sizes = {}
    original = jobs.factorize_batch

    def factorize_batch(weights, mid_features, *args, **kwargs):
        sizes.update((tuple(weight.shape), mid_features) for weight in weights)
        return original(weights, mid_features, *args, **kwargs)

    monkeypatch.setattr(jobs, "factorize_batch", factorize_batch)
    compiled(MLP(seed=21), overrides={"up": 8.0})(randn(5, 67))
    assert sizes[(130, 67)] > 1.5 * sizes[(67, 130)]


def test_layers_with_one_input_are_factored_as_one(caplog):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.q(x).sum(-1) + self.k(x).sum(-1)

    model, x = Attention().requires_grad_(False), randn(5, 64)
    counts = rewrites(caplog, model, x)
    assert (counts["merge_shared_inputs"], counts["replace_linears"]) == (1, 1)
    counts = rewrites(caplog, model, x, merge_shared_inputs=False)
    assert (counts["merge_shared_inputs"], counts["replace_linears"]) == (0, 2)
    # Layers of other bits do not share a factorization.
    assert rewrites(caplog, model, x, overrides={"k": 5.0})["merge_shared_inputs"] == 0


def test_importance_changes_the_factors():
    model, x = Block(8), randn(4, 70)
    plain = compiled(model)(x)
    torch.compiler.reset()
    moment = torch.logspace(-3, 3, 70)
    weighted = compiled(model, importance={"linear": dbf_compile.Importance(moment)})(x)
    assert error_of(weighted, plain) > 1e-3
    converted = factored(Block(8), importance={"linear": dbf_compile.Importance(moment)})
    assert error_of(weighted, converted(x)) < TOLERANCE


def test_a_checkpoint_of_ready_factors_is_used(tmp_path, count_factorizations):
    model, x = MLP(seed=31), randn(5, 67)
    config = dbf_compile.CompressionConfig(**OPTIONS)
    made = dbf_compile.factorize_model(model, config)
    dbf_compile.save(made, tmp_path / "factors.safetensors")
    expected = dbf_compile.convert_(MLP(seed=31), made)(x)
    count_factorizations.clear()
    run = compiled(model, checkpoint=str(tmp_path / "factors.safetensors"), iterations=5)
    assert error_of(run(x), expected) < TOLERANCE
    assert count_factorizations == []
    # Factors of weights nobody here has seen cannot follow a change.
    model.up.weight.mul_(2.0)
    with pytest.raises(dbf_compile.DBFError, match=r"'?up'?.*checkpoint"):
        run(x)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    made = dbf_compile.factorize_model(MLP(features=40), dbf_compile.CompressionConfig(**OPTIONS))
    dbf_compile.save(made, tmp_path / "factors.safetensors")
    with pytest.raises(Exception, match=r"ConversionError: factors of shape \(130, 40\) for 'up'"):
        compiled(MLP(), checkpoint=str(tmp_path / "factors.safetensors"))(randn(5, 67))


def test_a_checkpoint_that_is_missing_is_refused(tmp_path):
    with pytest.raises(Exception, match="CheckpointError"):
        compiled(MLP(), checkpoint=str(tmp_path / "nothing.safetensors"))(randn(5, 67))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, r"OptionError: unknown option 'rank'; allowed: accuracy, bits_per_weight, .*skip"),
        ({"bits_per_weight": "two"}, "OptionError: option bits_per_weight='two'; allowed: a number"),
        ({"bits_per_weight": 40.0}, "OptionError: 40.0 bits per weight"),
        ({"accuracy": "exakt"}, "OptionError: accuracy='exakt'; allowed: 'exact', 'fast'"),
        ({"mode": "fastest"}, "OptionError: mode='fastest'; allowed: default, .*max-autotune"),
        ({"inductor": {"no_such_setting": 1}}, "OptionError: unknown setting 'no_such_setting'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(MLP(), backend="dbf", options=options)(randn(5, 67))


@pytest.mark.parametrize("converted", [False, True])
def test_a_layer_is_one_call_and_its_accuracy_a_choice(converted):
    model, x = MLP(), randn(5, 67)
    eager = factored(model)
    exact = eager(x.double()).float()
    errors = {}
    for accuracy in ("exact", "fast"):
        torch.compiler.reset()
        run = compiled(eager if converted else model, accuracy=accuracy)
        y, (code,) = run_and_get_code(run, x)
        assert code.count("dbf_native.double_binary_linear.out(") == 2
        assert code.count("dbf_native.sign_matmul") == 0
        assert code.count("fast=True") == (2 if accuracy == "fast" else 0)
        assert code.count("interleaved=True") == 2
        errors[accuracy] = error_of(y, exact)
    assert errors["exact"] < 1e-6
    assert errors["exact"] < errors["fast"] < 1e-3


def test_modes_and_inductor_settings_are_taken():
    model, x = MLP(), randn(5, 67)
    eager = factored(model)(x)
    assert error_of(compiled(model, mode="max-autotune")(x), eager) < TOLERANCE
    torch.compiler.reset()
    assert error_of(compiled(model, inductor={"epilogue_fusion": False})(x), eager) < TOLERANCE
    torch.compiler.reset()
    run = torch.compile(factored(model), backend="dbf", mode="reduce-overhead")
    assert error_of(run(x), eager) < TOLERANCE


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
    for found, wanted in zip(compiled(model)(x), model(x), strict=True):
        assert found is wanted is None or error_of(found, wanted) < TOLERANCE


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
    assert len(backend._factored) > 0
    backend.dbf.reset()
    assert len(backend._factored) == 0


def test_the_memory_of_factors_does_not_keep_weights_alive():
    model = MLP()
    compiled(model)(randn(5, 67))
    weight = weakref.ref(model.up.weight)
    torch.compiler.reset()
    del model
    gc.collect()
    assert weight() is None


def test_ready_factors_are_stacked_only_if_they_share_their_first_stage(tmp_path, caplog):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 48)

        def forward(self, x):
            return self.q_proj(x).sum(-1) * self.k_proj(x).sum(-1)

    model, x = Pair().requires_grad_(False), randn(5, 64)
    made = dbf_compile.factorize_model(model, dbf_compile.CompressionConfig(**OPTIONS))
    together, apart = tmp_path / "together.safetensors", tmp_path / "apart.safetensors"
    dbf_compile.save(made, together)
    alone = {
        name: DoubleBinaryFactors(**{key: tensor.clone() for key, tensor in part.tensors().items()})
        for name, part in made.items()
    }
    dbf_compile.save(alone, apart)
    assert rewrites(caplog, model, x, checkpoint=str(together))["merge_shared_inputs"] == 1
    assert rewrites(caplog, model, x, checkpoint=str(apart))["merge_shared_inputs"] == 0
