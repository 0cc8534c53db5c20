"""Inputs and outputs of models: every kind of batch and output is understood, others are refused."""

from types import SimpleNamespace

import pytest
import torch
from support.models.calibrated import tiny
from torch import nn

from dbf_compile.calibration.model_io import (
    attention_mask,
    call_model,
    first_tensor,
    is_causal,
    logits_of,
    to_device,
    token_ids,
)
from dbf_compile.errors import ConversionError

IDS, X = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, 4)


class Sum(nn.Module):
    def forward(self, first, second=0):
        return first + second


@pytest.mark.parametrize(
    "batch", [IDS, [IDS, 0], (IDS,), {"first": IDS}, {"first": IDS, "second": 0}], ids=str
)
def test_a_batch_is_passed_as_arguments(batch):
    assert torch.equal(call_model(Sum(), batch), IDS)


def test_a_batch_of_another_type_is_refused():
    with pytest.raises(ConversionError, match="batch of type int"):
        call_model(Sum(), 3)


def test_all_tensors_of_a_batch_move():
    batch = {"ids": IDS, "rest": (X, [X, "text"], None)}
    moved = to_device(batch, "meta")
    assert (
        moved["ids"].device.type == moved["rest"][0].device.type == moved["rest"][1][0].device.type == "meta"
    )
    assert moved["rest"][1][1] == "text" and moved["rest"][2] is None


@pytest.mark.parametrize(
    "batch", [IDS, [IDS, X], (IDS,), {"input_ids": IDS, "x": X}], ids=lambda b: type(b).__name__
)
def test_token_ids_are_found(batch):
    assert token_ids(batch) is IDS


@pytest.mark.parametrize("batch", [X, [X, IDS], [], {"x": IDS}, {"input_ids": X}, 3], ids=str)
def test_what_is_no_tensor_of_integers_has_no_token_ids(batch):
    assert token_ids(batch) is None


def test_a_mask_is_bool_and_has_two_dimensions():
    mask = attention_mask({"attention_mask": torch.tensor([[1, 0]])})
    assert mask.dtype == torch.bool and mask.tolist() == [[True, False]]
    assert attention_mask({"attention_mask": torch.ones(1, 1, 2, 2)}) is None
    assert attention_mask({}) is attention_mask(IDS) is None


def test_the_first_tensor_is_the_hidden_state_or_the_first_of_floats():
    assert first_tensor(X) is X and first_tensor(IDS) is None
    assert first_tensor(SimpleNamespace(last_hidden_state=X, other=2 * X)) is X
    assert first_tensor((IDS, [{"a": IDS, "b": X}])) is X
    assert first_tensor("text") is first_tensor(None) is first_tensor([]) is None


def test_logits_are_the_output_or_its_logits():
    assert logits_of(X) is X and logits_of(SimpleNamespace(logits=X)) is X


def test_only_decoders_are_causal():
    pytest.importorskip("transformers")
    assert is_causal(tiny("causal"))
    assert not is_causal(tiny("masked")) and not is_causal(tiny("encoder")) and not is_causal(Sum())
