"""Losses: every kind of model has one, padding counts in none, and surrogates estimate what they stand for."""

import pytest
import torch
from support.models.calibrated import Net, WithLoss, tiny, tokens
from torch import nn

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.calibration.losses import loss_named, next_token_loss, output_loss
from dbf_compile.errors import ConversionError, OptionError

pytest.importorskip("transformers")


def test_the_output_may_bring_its_own_loss(batches):
    importance = calibrate(WithLoss(), batches, loss=output_loss)
    assert max(float(item.output_grad_second_moment.amax()) for item in importance.values()) == 1
    with pytest.raises(ConversionError, match="without a loss"):
        calibrate(Net(), batches, loss=output_loss)


@pytest.mark.parametrize("kind", ["causal", "masked", "encoder"])
@pytest.mark.parametrize("loss", ["auto", "sampled", "output"])
def test_every_kind_of_model_has_a_loss(kind, loss):
    if kind == "encoder" and loss == "sampled":
        with pytest.raises(ConversionError, match="without logits"):
            calibrate(tiny(kind), tokens(), loss=loss)
        return
    importance = calibrate(tiny(kind), tokens(), loss=loss)
    inner = [item for name, item in importance.items() if "layer" in name]
    assert len(inner) >= 12
    assert all(item.output_grad_second_moment.any() for item in inner)
    again = calibrate(tiny(kind), tokens(), loss=loss)
    assert all(
        torch.equal(importance[name].output_grad_second_moment, again[name].output_grad_second_moment)
        for name in importance
        if importance[name].output_grad_second_moment is not None
    )


def test_auto_is_the_loss_that_fits():
    causal = calibrate(tiny("causal"), tokens())
    labelled = calibrate(tiny("causal"), [{**batch, "labels": batch["input_ids"]} for batch in tokens()])
    explicit = calibrate(tiny("causal"), tokens(), loss="next_token")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(causal[name].output_grad_second_moment, explicit[name].output_grad_second_moment)
    # The model's own loss is the same mean over the same tokens, summed by other code.
    torch.testing.assert_close(
        causal[name].output_grad_second_moment, labelled[name].output_grad_second_moment, rtol=1e-4, atol=1e-9
    )


def test_the_output_loss_estimates_the_jacobian():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    batch = torch.randn(1, 3, generator=torch.Generator().manual_seed(3))
    moment = calibrate(model, [batch] * 4000, loss="output")["0"].output_grad_second_moment
    hidden = model[0](batch[0]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda y: model[2](torch.tanh(y)), hidden)
    exact = jacobian.square().sum(0)
    # 4000 squares of normal numbers: a standard error of √(2 / 4000) = 2.2 %, of which five.
    torch.testing.assert_close(moment / moment.sum(), exact / exact.sum(), rtol=0.11, atol=0)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("causal", "next_token"), ("masked", "sampled"), ("encoder", "output")],
)
def test_padding_has_no_part_in_a_loss(kind, loss):
    (batch,) = tokens(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 8:] = 0
    model = tiny(kind)
    criterion = loss_named(loss, model, torch.Generator().manual_seed(0))
    outputs = model(**batch, attention_mask=mask)
    prediction = outputs.last_hidden_state if loss == "output" else outputs.logits
    (gradient,) = torch.autograd.grad(criterion(outputs, {**batch, "attention_mask": mask}), prediction)
    assert gradient[:, :7].any() and not gradient[:, 8:].any()


def test_a_loss_of_another_name_is_refused():
    with pytest.raises(OptionError, match="next_token"):
        loss_named("nll", Net(), torch.Generator())


@pytest.mark.parametrize(
    "ids", [None, torch.ones(1, 1, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)]
)
def test_next_tokens_need_ids_that_fit_the_logits(ids):
    with pytest.raises(ConversionError, match="token ids"):
        next_token_loss(torch.zeros(1, 1, 7), {"input_ids": ids})
