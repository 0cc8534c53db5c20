"""Inputs and outputs of models: every kind of batch and output is understood, others are refused."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models.calibrated import tiny
from torch import Tensor, nn

from dbf_compile import machine
from dbf_compile.calibration import model_io
from dbf_compile.calibration.model_io import (
    attention_mask,
    call_model,
    check_reads_tokens,
    first_tensor,
    is_causal,
    is_encoder_decoder,
    logits_of,
    next_tokens,
    predicted_ids,
    predicts_tokens,
    reads_tokens,
    to_device,
    token_ids,
    vocabulary_of,
    with_decoder_inputs,
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


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 999), st.booleans())
def test_padding_is_not_predicted_and_predicts_nothing(rows, tokens, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (rows, tokens), generator=generator)
    mask = torch.randint(2, (rows, tokens), generator=generator)
    batch = {"input_ids": ids, **({"attention_mask": mask} if masked else {})}
    kept = mask if masked else torch.ones_like(mask)
    expected = [
        [
            int(ids[b, t + 1]) if t + 1 < tokens and kept[b, t] and kept[b, t + 1] else -100
            for t in range(tokens)
        ]
        for b in range(rows)
    ]
    assert next_tokens(ids, batch).tolist() == expected


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


class Seq2Seq(nn.Module):
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=7, vocab_size=9)

    def __init__(self, generates=True):
        super().__init__()
        self.can_generate = lambda: generates

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        return {"decoder_input_ids": decoder_input_ids, "labels": labels}


def test_a_decoder_is_to_repeat_what_the_encoder_reads_but_padding():
    mask = torch.tensor([[1, 1, 0]])
    for batch in (IDS, {"input_ids": IDS}):
        assert torch.equal(with_decoder_inputs(Seq2Seq(), batch)["labels"], IDS)
        assert torch.equal(call_model(Seq2Seq(), batch)["labels"], IDS)
        shifted = with_decoder_inputs(Seq2Seq(generates=False), batch)
        assert shifted["decoder_input_ids"].tolist() == [[7, 1, 2]] and "labels" not in shifted
    padded = with_decoder_inputs(Seq2Seq(), {"input_ids": IDS, "attention_mask": mask})
    assert padded["labels"].tolist() == [[1, 2, -100]] and padded["attention_mask"] is mask
    assert IDS.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "labels": IDS},
        {"input_ids": IDS, "decoder_input_ids": IDS},
        {"input_ids": IDS, "decoder_inputs_embeds": X},
        {"input_features": X},
        [IDS, None, IDS],
        X,
    ],
    ids=str,
)
def test_batches_that_say_what_the_decoder_reads_stay_as_they_are(batch):
    assert with_decoder_inputs(Seq2Seq(), batch) is batch


def test_models_without_an_encoder_get_their_batches_as_they_are():
    batch = {"first": IDS}
    assert with_decoder_inputs(Sum(), batch) is batch


def test_predictions_are_those_of_the_decoder():
    other = IDS + 1
    assert predicted_ids({"input_ids": IDS, "decoder_input_ids": other}) is other
    assert predicted_ids({"input_ids": IDS, "labels": other}) is other
    assert predicted_ids({"input_ids": IDS, "labels": torch.tensor([1])}) is IDS
    assert predicted_ids(IDS) is IDS and predicted_ids({"pixel_values": X}) is None


class Towers(nn.Module):
    def forward(self, input_ids, pixel_values=None):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return pixel_values


class TextTower(Towers):
    def get_text_features(self, input_ids):
        return input_ids + 1


class Speech(nn.Module):
    def forward(self, input_features, decoder_input_ids=None):
        return input_features


def test_text_alone_runs_a_tower_of_text_or_is_refused_with_what_is_missing():
    assert torch.equal(call_model(TextTower(), {"input_ids": IDS}), IDS + 1)
    assert torch.equal(call_model(TextTower(), IDS), IDS + 1)
    assert call_model(TextTower(), {"input_ids": IDS, "pixel_values": X}) is X
    with pytest.raises(ConversionError, match=r"tokens alone for Towers.*pixel_values too.*batches="):
        call_model(Towers(), {"input_ids": IDS})
    with pytest.raises(ConversionError, match=r"tokens alone for Speech.*input_features"):
        call_model(Speech(), {"input_ids": IDS})


def test_errors_of_a_model_that_reads_text_alone_are_its_own():
    with pytest.raises(TypeError):
        call_model(Sum(), {"third": IDS})
    with pytest.raises(TypeError):
        call_model(Towers(), {"input_ids": IDS, "pixel_values": X, "third": X})


def test_models_of_speech_read_no_tokens():
    assert not reads_tokens(Speech()) and reads_tokens(Towers()) and reads_tokens(Sum())
    with pytest.raises(ConversionError, match=r"text for Speech.*input_features"):
        check_reads_tokens(Speech())
    check_reads_tokens(Sum())


def test_kinds_of_models():
    assert is_encoder_decoder(Seq2Seq()) and predicts_tokens(Seq2Seq()) and not is_causal(Seq2Seq())
    assert not is_encoder_decoder(Sum()) and not predicts_tokens(Sum())
    assert vocabulary_of(Seq2Seq()) == 9 and vocabulary_of(Sum()) is None
    wrapper = nn.Module()
    wrapper.config = SimpleNamespace(get_text_config=lambda **_: SimpleNamespace(vocab_size=11))
    assert vocabulary_of(wrapper) == 11


class Mixed(nn.Module):
    """A model that mixes dtypes where its products are narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 4), 0.0).scatter_(
            1, torch.zeros(len(x), 1, dtype=torch.long), self.first(x)
        )


@pytest.mark.parametrize("gains", [False, True])
def test_products_are_narrow_where_that_gains_and_the_model_computes(monkeypatch, gains):
    monkeypatch.setattr(model_io, "multiplies_bfloat16", lambda kind: gains)
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda kind: gains)
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert model_io.computes_narrowly(linear, x) is gains
    assert not model_io.computes_narrowly(linear, x, torch.device("meta"))  # it is to compute elsewhere
    assert torch.isfinite(Mixed()(x)).all()
    assert not model_io.computes_narrowly(linear, x * torch.inf)
    assert not model_io.computes_narrowly(Mixed(), x)
    assert not model_io.computes_narrowly(nn.Linear(4, 3, device="meta"), x)
