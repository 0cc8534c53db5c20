"""What options of the backend do: bits, layers left out, importance, checkpoints, accuracy, Inductor's settings."""

import pytest
import torch
from support.compiled import TOLERANCE, Block, compiled, rewrites
from support.models.tiny import MLP, OPTIONS, error_of, factored, randn
from torch import nn
from torch._inductor.utils import run_and_get_code

import dbf_compile
from dbf_compile.compression import jobs
from dbf_compile.factors import DoubleBinaryFactors


def test_skipped_and_too_small_layers_stay_dense(caplog):
    model, x = MLP(), randn(5, 67)
    assert rewrites(caplog, model, x)["replace_linears"] == 2
    assert rewrites(caplog, model, x, skip=["up"])["replace_linears"] == 1
    assert rewrites(caplog, model, x, skip=["*"])["replace_linears"] == 0
    assert (
        rewrites(caplog, nn.Sequential(nn.Linear(4, 3)).requires_grad_(False), randn(5, 4))["replace_linears"]
        == 0
    )


def test_a_record_serves_as_options_and_single_fields_win(caplog):
    model, x = MLP(), randn(5, 67)
    config = dbf_compile.CompileOptions(**OPTIONS, skip=("up",))
    assert rewrites(caplog, model, x, config=config)["replace_linears"] == 1
    assert rewrites(caplog, model, x, config=config, skip=["*"])["replace_linears"] == 0


def test_overrides_set_bits_by_layer_name(factorized_shapes, monkeypatch):
    sizes = {}
    original = jobs.factorize_batch

    def factorize_batch(weights, mid_features, *args, **kwargs):
        sizes.update((tuple(weight.shape), mid_features) for weight in weights)
        return original(weights, mid_features, *args, **kwargs)

    monkeypatch.setattr(jobs, "factorize_batch", factorize_batch)
    compiled(MLP(seed=21), overrides={"up": 8.0})(randn(5, 67))
    assert sizes[(130, 67)] > 1.5 * sizes[(67, 130)]


@pytest.mark.slow
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


def test_a_checkpoint_of_ready_factors_is_used(tmp_path, factorized_shapes):
    model, x = MLP(seed=31), randn(5, 67)
    config = dbf_compile.CompressionConfig(**OPTIONS)
    factors = dbf_compile.factorize_model(model, config)
    dbf_compile.save(factors, tmp_path / "factors.safetensors")
    expected = dbf_compile.convert_(MLP(seed=31), factors)(x)
    factorized_shapes.clear()
    run = compiled(model, checkpoint=str(tmp_path / "factors.safetensors"), iterations=5)
    assert error_of(run(x), expected) < TOLERANCE
    assert factorized_shapes == []
    # Factors of weights nobody here has seen cannot follow a change.
    model.up.weight.mul_(2.0)
    with pytest.raises(dbf_compile.DBFError, match=r"'?up'?.*checkpoint"):
        run(x)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    factors = dbf_compile.factorize_model(MLP(features=40), dbf_compile.CompressionConfig(**OPTIONS))
    dbf_compile.save(factors, tmp_path / "factors.safetensors")
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


@pytest.mark.slow
def test_ready_factors_are_stacked_only_if_they_share_their_first_stage(tmp_path, caplog):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 48)

        def forward(self, x):
            return self.q_proj(x).sum(-1) * self.k_proj(x).sum(-1)

    model, x = Pair().requires_grad_(False), randn(5, 64)
    factors = dbf_compile.factorize_model(model, dbf_compile.CompressionConfig(**OPTIONS))
    together, apart = tmp_path / "together.safetensors", tmp_path / "apart.safetensors"
    dbf_compile.save(factors, together)
    alone = {
        name: DoubleBinaryFactors(**{key: tensor.clone() for key, tensor in part.tensors().items()})
        for name, part in factors.items()
    }
    dbf_compile.save(alone, apart)
    assert rewrites(caplog, model, x, checkpoint=str(together))["merge_shared_inputs"] == 1
    assert rewrites(caplog, model, x, checkpoint=str(apart))["merge_shared_inputs"] == 0
