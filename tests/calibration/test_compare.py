"""Comparison of two models: divergence, agreement, and the measures of every kind of model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models.tiny import tiny_bert, tiny_llama
from torch import nn

from dbf_compile.calibration import compare as comparison
from dbf_compile.calibration.compare import agreement, compare, compare_kinds, divergence, squared_error
from dbf_compile.errors import ConversionError


def test_divergence_is_that_of_distributions_and_leaves_padding_out():
    dense, compressed = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    kl = divergence(dense, compressed)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=dense), torch.distributions.Categorical(logits=compressed)
    )
    assert torch.allclose(kl, expected.flatten(), atol=1e-5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.allclose(divergence(dense, compressed, mask.bool()), expected[mask.bool()], atol=1e-5)
    assert agreement(dense, dense, mask.bool()).tolist() == [True] * 3


@given(st.integers(0, 99), st.integers(1, 6))
def test_a_divergence_is_never_negative_and_zero_for_equal_predictions(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    dense, compressed = (torch.randn(2, 3, classes, generator=generator) for _ in range(2))
    assert divergence(dense, compressed).min() >= -1e-6  # float32
    # A constant in all logits of a position changes no prediction.
    assert divergence(dense, dense + 3.0).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("at_a_time", [1, 14, 2**19])
def test_the_gradient_of_a_divergence_is_that_of_its_formula(monkeypatch, at_a_time, dtype):
    monkeypatch.setattr(comparison, "_AT_A_TIME", at_a_time)
    # Logits may lie in another order than their sizes say.
    dense, compressed = (torch.randn(7, 2, 5, dtype=torch.float64).to(dtype).movedim(0, 2) for _ in range(2))
    weights = torch.rand(10, dtype=torch.float64)
    exact = compressed.double().requires_grad_()
    log_dense, log_compressed = (torch.log_softmax(logits.double(), -1) for logits in (dense, exact))
    ((log_dense.exp() * (log_dense - log_compressed)).sum(-1).flatten() * weights).sum().backward()
    (divergence(dense, compressed.requires_grad_()) * weights).sum().backward()
    assert compressed.grad.dtype == dtype and exact.grad is not None
    # The gradient has two roundings to the dtype; the divergence itself is computed in float32.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(compressed.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_models_without_tokens_are_compared_by_their_output():
    dense, compressed = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(7, 4)
    lost = (dense(x) - compressed(x)).square().sum() / dense(x).square().sum()
    measured = compare(dense, compressed, x.split(3))
    assert measured["error"] == pytest.approx(float(lost.detach()), rel=1e-5)  # float32 sums
    assert "output" in measured["measure"] and "kl" not in measured


def test_without_a_dense_model_nothing_is_compared():
    assert compare(None, nn.Linear(4, 3), [torch.randn(7, 4)]) == {}


def windows(count=3, length=12):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 256, (2, length), generator=generator)} for _ in range(count)]


def test_a_model_compared_with_itself_has_no_distance():
    model = tiny_llama()
    found = compare(model, model, windows())
    assert found["kl"] == pytest.approx(0.0, abs=1e-6) and found["top1_agreement"] == 1.0
    assert found["dense"] == found["compressed"]
    losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in windows()]
    assert found["compressed"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["compressed"]))
    assert "66 predictions" in found["measure"]


def test_distance_is_that_of_the_predictions():
    dense = tiny_llama()
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
        logits = [(dense(**batch).logits, other(**batch).logits) for batch in windows()]
    found = compare(dense, other, windows())
    kl = [
        torch.nn.functional.kl_div(
            y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        for x, y in logits
    ]
    assert found["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    same = torch.cat([(x.argmax(-1) == y.argmax(-1)).flatten() for x, y in logits])
    assert found["top1_agreement"] == pytest.approx(float(same.float().mean()))


def test_encoders_are_compared_by_their_output_and_nothing_is_made_up():
    dense, other = tiny_bert(), tiny_bert()
    with torch.no_grad():
        other.encoder.layer[1].output.LayerNorm.weight.mul_(1.1)
    found = compare(dense, other, windows())
    assert set(found) == {"error", "measure"} and 0 < found["error"] < 0.1
    assert compare(None, dense, windows()) == {}
    assert compare(dense, dense, []) == {}


def test_the_error_of_an_output_leaves_padding_out():
    dense, other = tiny_bert(), tiny_bert()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(2.0)
    (batch,) = windows(count=1)
    tokens = batch["input_ids"].shape[1]
    longer = nn.functional.pad(batch["input_ids"], (0, 5), value=3)
    mask = torch.ones_like(longer)
    mask[:, tokens:] = 0
    found = compare(dense, other, [{"input_ids": longer, "attention_mask": mask}])
    # What is no padding attends to no padding, so both have the same outputs up to rounding.
    alone = compare(dense, other, [{"input_ids": batch["input_ids"]}])
    assert found["error"] == pytest.approx(alone["error"], rel=1e-4)


def test_outputs_without_a_place_for_each_token_count_whole():
    dense, output = torch.randn(3, 3), torch.randn(3, 3)  # as many features as tokens
    lost, power = squared_error(dense, output, torch.zeros(3, 3, dtype=torch.bool))
    assert lost == pytest.approx(float((output - dense).double().square().sum()))
    assert power == pytest.approx(float(dense.double().square().sum()))


def test_padding_is_no_prediction():
    model = tiny_llama()
    (batch,) = windows(count=1)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 7:] = 0
    padded = {**batch, "attention_mask": mask}
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    found = compare(model, model, [padded])
    assert found["compressed"] == pytest.approx(float(model(**padded, labels=labels).loss), rel=1e-5)
    assert "17 predictions" in found["measure"]


def test_padding_alone_has_no_error():
    dense, other = tiny_bert(), tiny_bert()
    (batch,) = windows(count=1)
    padding = {**batch, "attention_mask": torch.zeros_like(batch["input_ids"])}
    assert compare(dense, other, [padding]) == {}
    assert compare(dense, other, [padding, batch]) == compare(dense, other, [batch])


@pytest.mark.parametrize("named", ["labels", "decoder_attention_mask"])
def test_positions_of_an_encoder_decoder_are_those_of_its_decoder(named):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    dense, other = (transformers.T5ForConditionalGeneration(config).eval() for _ in range(2))
    ids, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0  # the encoder reads less than the decoder writes
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[1, 6:] = False
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= (
        {"labels": ids.masked_fill(~kept, -100)}
        if named == "labels"
        else {"decoder_input_ids": ids, "decoder_attention_mask": kept.long()}
    )
    every = divergence(dense(**batch).logits, other(**batch).logits, kept)
    assert compare(dense, other, [batch])["kl"] == pytest.approx(float(every.mean()), rel=1e-4)


def test_models_of_different_vocabularies_are_not_compared():
    other = tiny_llama(vocab_size=300)
    with pytest.raises(ConversionError, match="logits of 300 tokens for one of 256"):
        compare(other, tiny_llama(), windows(count=1))


def test_every_kind_counts_alike_and_the_worst_is_named():
    dense, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    parts = {"web": windows(count=1), "code": windows(count=3)[1:]}
    measured = compare_kinds(dense, other, parts)
    assert measured["kinds"] == {kind: compare(dense, other, part) for kind, part in parts.items()}
    for name in ("kl", "nats_lost", "top1_agreement", "compressed"):
        assert measured[name] == pytest.approx(sum(part[name] for part in measured["kinds"].values()) / 2)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["compressed"]))
    assert measured["worst_kind"] == max(parts, key=lambda kind: measured["kinds"][kind]["kl"])
    alone = compare_kinds(None, other, parts)
    assert "kl" not in alone and "nats_lost" not in alone
    assert alone["worst_kind"] == max(parts, key=lambda kind: alone["kinds"][kind]["compressed"])
    assert compare_kinds(dense, other, {"web": []}) == {}


def test_a_divergence_does_not_depend_on_the_pieces_it_is_computed_in(monkeypatch):
    dense, compressed = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    whole = divergence(dense, compressed)
    monkeypatch.setattr(comparison, "_AT_A_TIME", 21)
    assert torch.equal(divergence(dense, compressed), whole)
