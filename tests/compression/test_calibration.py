"""Calibration: the moments are right, and the model is left as it was."""

import pytest
import torch
from torch import nn

from dbf_compile.compression.calibration import calibrate
from dbf_compile.compression.losses import output_loss
from dbf_compile.errors import ConversionError, WeightError


class Net(nn.Module):
    """Two linears with an in-place activation between, a dropout, and a third linear that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.second(self.dropout(self.first(x * scale)).relu_())


class WithLoss(nn.Module):
    """Returns an object that carries a loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return type("Output", (), {"loss": self.net(x).square().mean()})()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 4, 5, generator=generator) for rows in (1, 3)]


def squared_sum(output, batch):
    return output.square().sum()


def test_input_moments_are_means_over_all_positions(batches):
    model = Net()
    found = calibrate(model, batches, loss=None)
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    hidden = model.first(positions).relu().detach()
    assert set(found) == {"first", "second"}
    # Moments are summed in float64 and rounded once; the hidden layer is a float32 product of another shape.
    torch.testing.assert_close(
        found["first"].input_second_moment, positions.square().mean(0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        found["second"].input_second_moment, hidden.square().mean(0), rtol=1e-5, atol=1e-7
    )
    assert found["first"].output_grad_second_moment is None


def test_gradient_moments_match_autograd_up_to_one_factor_for_all_layers(batches):
    model = Net().eval()
    found = calibrate(model, batches, loss=squared_sum)
    positions = torch.cat([batch.reshape(-1, 5) for batch in batches])
    hidden = model.first(positions)
    output = model.second(hidden.relu())
    grads = torch.autograd.grad(output.square().sum(), [hidden, output])
    moments = [grad.square().mean(0) for grad in grads]
    common = max(moment.amax() for moment in moments)
    for name, moment in zip(("first", "second"), moments, strict=True):
        # float32 products in another order.
        torch.testing.assert_close(
            found[name].output_grad_second_moment, moment / common, rtol=1e-4, atol=1e-7
        )


def test_frozen_models_have_gradient_moments_too(batches):
    free = calibrate(Net(), batches, loss=squared_sum)
    frozen = calibrate(Net().requires_grad_(False), batches, loss=squared_sum)
    for name in free:
        assert torch.equal(free[name].output_grad_second_moment, frozen[name].output_grad_second_moment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_give_float32_moments(batches, dtype):
    found = calibrate(Net().to(dtype), [batch.to(dtype) for batch in batches], loss=squared_sum)
    assert found["first"].input_second_moment.dtype == torch.float32
    assert found["first"].output_grad_second_moment.dtype == torch.float32


def test_tiny_gradients_do_not_vanish(batches):
    tiny = calibrate(Net(), batches, loss=lambda output, batch: 1e-30 * output.square().sum())
    plain = calibrate(Net(), batches, loss=squared_sum)
    # 1e-30 is no power of two: float32 rounds every gradient differently.
    torch.testing.assert_close(
        tiny["first"].output_grad_second_moment, plain["first"].output_grad_second_moment, rtol=1e-5, atol=0
    )


def test_batches_may_be_tensors_sequences_or_mappings(batches):
    expected = calibrate(Net(), batches)["second"].input_second_moment
    for form in (lambda b: (b, 1.0), lambda b: [b], lambda b: {"x": b, "scale": 1.0}):
        assert torch.equal(calibrate(Net(), map(form, batches))["second"].input_second_moment, expected)


def test_the_loss_sees_output_and_batch(batches):
    seen = []

    def loss(output, batch):
        seen.append((tuple(output.shape), batch["x"].shape[0]))
        return output.sum()

    calibrate(Net(), [{"x": batch} for batch in batches], loss=loss)
    assert seen == [((1, 4, 3), 1), ((3, 4, 3), 3)]


def test_the_output_may_bring_its_own_loss(batches):
    found = calibrate(WithLoss(), batches, loss=output_loss)
    assert max(float(item.output_grad_second_moment.amax()) for item in found.values()) == 1
    with pytest.raises(ConversionError, match="without a loss"):
        calibrate(Net(), batches, loss=output_loss)


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
    found = calibrate(nn.Sequential(shared, nn.Hardtanh(-1, 1), shared), [torch.tensor([[3.0, 1.0]])])
    assert found["0"].input_second_moment.tolist() == [5, 1]


def state_of(model, batches):
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [batch.grad for batch in batches],
        torch.is_grad_enabled(),
        torch.random.get_rng_state(),
    )


def same(before, after):
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, (tuple, list)):
        return all(map(same, before, after))
    return before == after


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


def test_layers_the_loss_does_not_reach_have_input_moments_only(batches):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.ignored = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.used(x), self.ignored(x)

    found = calibrate(TwoHeads(), batches, loss=lambda output, batch: output[0].sum())
    assert found["ignored"].output_grad_second_moment is None
    assert found["used"].output_grad_second_moment is not None
