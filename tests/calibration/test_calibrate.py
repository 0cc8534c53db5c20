"""Calibration: the moments are right, and the model is left as it was."""

import pytest
import torch
from support.models.calibrated import Net, same, squared_sum, state_of, tiny
from torch import nn

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.errors import ConversionError, OptionError, WeightError


def test_input_moments_are_means_over_all_positions(batches):
    model = Net()
    importance = calibrate(model, batches, loss=None)
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    hidden = model.first(positions).relu().detach()
    assert set(importance) == {"first", "second"}
    # Moments are summed in float64 and rounded once; the hidden layer is a float32 product of another shape.
    torch.testing.assert_close(
        importance["first"].input_second_moment, positions.square().mean(0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        importance["second"].input_second_moment, hidden.square().mean(0), rtol=1e-5, atol=1e-7
    )
    assert importance["first"].output_grad_second_moment is None


def test_gradient_moments_match_autograd_up_to_one_factor_for_all_layers(batches):
    model = Net().eval()
    importance = calibrate(model, batches, loss=squared_sum)
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    hidden = model.first(positions)
    output = model.second(hidden.relu())
    grads = torch.autograd.grad(output.square().sum(), [hidden, output])
    moments = [grad.square().mean(0) for grad in grads]
    common = max(moment.amax() for moment in moments)
    for name, moment in zip(("first", "second"), moments, strict=True):
        # float32 products in another order.
        torch.testing.assert_close(
            importance[name].output_grad_second_moment, moment / common, rtol=1e-4, atol=1e-7
        )


def test_frozen_models_have_gradient_moments_too(batches):
    free = calibrate(Net(), batches, loss=squared_sum)
    frozen = calibrate(Net().requires_grad_(False), batches, loss=squared_sum)
    for name in free:
        assert torch.equal(free[name].output_grad_second_moment, frozen[name].output_grad_second_moment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_give_float32_moments(batches, dtype):
    importance = calibrate(Net().to(dtype), [batch.to(dtype) for batch in batches], loss=squared_sum)
    assert importance["first"].input_second_moment.dtype == torch.float32
    assert importance["first"].output_grad_second_moment.dtype == torch.float32


def test_tiny_gradients_do_not_vanish(batches):
    tiny = calibrate(Net(), batches, loss=lambda output, batch: 1e-30 * output.square().sum())
    plain = calibrate(Net(), batches, loss=squared_sum)
    # 1e-30 is no power of two: float32 rounds every gradient differently.
    torch.testing.assert_close(
        tiny["first"].output_grad_second_moment, plain["first"].output_grad_second_moment, rtol=1e-5, atol=0
    )


def test_batches_may_be_tensors_sequences_or_mappings(batches):
    expected = calibrate(Net(), batches)["second"].input_second_moment
    for call in (lambda b: (b, 1.0), lambda b: [b], lambda b: {"x": b, "scale": 1.0}):
        assert torch.equal(calibrate(Net(), map(call, batches))["second"].input_second_moment, expected)


def test_the_loss_sees_output_and_batch(batches):
    seen = []

    def loss(output, batch):
        seen.append((tuple(output.shape), batch["x"].shape[0]))
        return output.sum()

    calibrate(Net(), [{"x": batch} for batch in batches], loss=loss)
    assert seen == [((1, 4, 3), 1), ((3, 4, 3), 3)]


def test_a_layer_called_by_keyword_is_measured():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=x)

    assert calibrate(Keyword(), [torch.ones(4)])["layer"].input_second_moment.tolist() == [1, 1, 1, 1]


def test_a_layer_called_twice_counts_both():
    shared = nn.Linear(2, 2, bias=False)
    nn.init.eye_(shared.weight)
    importance = calibrate(nn.Sequential(shared, nn.Hardtanh(-1, 1), shared), [torch.tensor([[3.0, 1.0]])])
    assert importance["0"].input_second_moment.tolist() == [5, 1]


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "raises"])
def test_the_model_is_left_as_it_was(batches, fails):
    model = Net().train()
    model.second.eval()
    model.first.weight.requires_grad_(False)
    model.second.weight.grad = torch.ones_like(model.second.weight)
    batches = [batch.requires_grad_() for batch in batches]
    before = state_of(model, batches)

    def loss(output, batch):
        if fails:
            raise ZeroDivisionError
        return squared_sum(output, batch)

    if fails:
        with pytest.raises(ZeroDivisionError):
            calibrate(model, batches, loss=loss)
    else:
        calibrate(model, batches, loss=loss)
    assert same(before, state_of(model, batches))


def test_no_batches_are_an_error():
    with pytest.raises(ConversionError, match="no batches"):
        calibrate(Net(), iter(()))


def test_a_batch_of_an_unknown_type_is_an_error():
    with pytest.raises(ConversionError, match="batch of type int"):
        calibrate(Net(), [3])


@pytest.mark.parametrize(
    "loss",
    [lambda o, b: o, lambda o, b: 1.0, lambda o, b: o.sum().detach()],
    ids=["matrix", "number", "detached"],
)
def test_a_loss_without_gradient_is_an_error(batches, loss):
    with pytest.raises(ConversionError, match="a loss of"):
        calibrate(Net(), batches, loss=loss)


def test_an_overflowing_layer_is_named():
    with pytest.raises(WeightError, match="first: input_second_moment"):
        calibrate(Net(), [torch.full((1, 5), float("inf"))])


def test_nan_activations_are_refused_by_layer():
    with pytest.raises(WeightError, match="first: input_second_moment"):
        calibrate(Net(), [torch.full((1, 5), float("nan"))], loss=None)


def test_layers_the_loss_does_not_reach_have_input_moments_only(batches):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.ignored = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.used(x), self.ignored(x)

    importance = calibrate(TwoHeads(), batches, loss=lambda output, batch: output[0].sum())
    assert importance["ignored"].output_grad_second_moment is None
    assert importance["used"].output_grad_second_moment is not None


def test_only_the_layers_asked_for_are_measured(batches):
    assert set(calibrate(Net(), batches, loss=None, layers=["sec*"])) == {"second"}


def test_layers_never_reached_are_named_in_a_warning(batches, caplog):
    calibrate(Net(), batches, loss=None)
    assert "unused" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "full"}, "'diagonal'|diagonal"),
        ({"clip": 1.5}, "between 0 and 1"),
        ({"loss": "nll"}, "next_token"),
    ],
    ids=str,
)
def test_unknown_options_are_refused(batches, options, message):
    with pytest.raises(OptionError, match=message):
        calibrate(Net(), batches, **options)


def test_gradients_of_layers_can_be_compared():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.eye_(model[0].weight)
    model[1].weight.data = 10 * torch.eye(4)
    importance = calibrate(model, [torch.ones(3, 4)], loss=lambda output, batch: output.sum())
    # ∂loss/∂y is 1 behind the second layer and 10 before it.
    assert importance["0"].output_grad_second_moment.tolist() == pytest.approx([1.0] * 4)
    assert importance["1"].output_grad_second_moment.tolist() == pytest.approx([0.01] * 4)


def test_without_data_tokens_are_random_and_the_same_every_time():
    first, second, other = (calibrate(tiny("causal"), seed=seed) for seed in (0, 0, 1))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(first[name].input_second_moment, second[name].input_second_moment)
    assert not torch.equal(first[name].input_second_moment, other[name].input_second_moment)
    with pytest.raises(ConversionError, match="vocab_size"):
        calibrate(Net())
