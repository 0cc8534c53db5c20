"""Sampling: distributions are those of transformers, seeds repeat, options that exclude each other are refused."""

import pytest
import torch

from dbf_compile.errors import OptionError
from dbf_compile.options import Sampling
from dbf_compile.sampling import Sampler, checked

LOGITS = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, -3.0], [0.0, 0.1, 0.2, 3.0, 2.9, -9.0]])


def drawn(settings, count=4000):
    sampler = Sampler(settings, 2 * count, LOGITS.device)
    tokens = sampler.choose(LOGITS.repeat_interleave(count, 0), [[]] * 2 * count).view(2, count)
    return torch.stack([torch.bincount(row, minlength=6) / count for row in tokens])


def expected(**settings):
    """Return the probabilities of transformers."""
    generation = pytest.importorskip("transformers").generation.logits_process
    scores = LOGITS
    for name, kind in (
        ("temperature", generation.TemperatureLogitsWarper),
        ("top_k", generation.TopKLogitsWarper),
        ("top_p", generation.TopPLogitsWarper),
        ("min_p", generation.MinPLogitsWarper),
    ):
        if settings.get(name) is not None:
            scores = kind(settings[name])(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"temperature": 1.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_transformers_draws_them(settings):
    torch.manual_seed(0)
    shares, exact = drawn(Sampling(do_sample=True, **settings)), expected(**settings)
    assert torch.equal(shares > 0, (exact > 1e-3) & (shares > 0))
    assert (shares - exact).abs().max() < 0.04  # five standard deviations of 4,000 draws


def test_the_likeliest_token_stays_whatever_the_limits():
    for limits in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}):
        assert Sampler(Sampling(do_sample=True, **limits), 2, LOGITS.device).choose(
            LOGITS, [[], []]
        ).tolist() == [0, 3]


def test_equal_seeds_draw_equal_tokens_and_rows_those_of_their_own_seed():
    logits = torch.zeros(3, 1000)
    settings = Sampling(do_sample=True, seed=5)
    both = [Sampler(settings, 3, logits.device).choose(logits, [[]] * 3).tolist() for _ in range(2)]
    assert both[0] == both[1]
    alone = Sampler(Sampling(do_sample=True, seed=7), 1, logits.device).choose(logits[:1], [[]])
    assert both[0][2] == alone.item()


def test_a_repetition_penalty_is_that_of_transformers():
    kind = pytest.importorskip("transformers").generation.logits_process.RepetitionPenaltyLogitsProcessor
    history = [[0, 0, 4], [3]]
    sampler = Sampler(Sampling(repetition_penalty=3.0), 2, LOGITS.device)
    exact = torch.cat(
        [
            kind(3.0)(torch.tensor([tokens]), row[None].clone())
            for tokens, row in zip(history, LOGITS, strict=True)
        ]
    )
    assert sampler.choose(LOGITS, history).tolist() == exact.argmax(-1).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [({}, False), ({"seed": 1}, False), ({"top_p": 0.9}, True), ({"temperature": 0.0, "top_k": 3}, False)],
    ids=str,
)
def test_a_setting_of_drawing_asks_for_drawing(settings, drawn):
    resolved = checked(Sampling(**settings))
    assert resolved.do_sample is drawn and (drawn or resolved.top_k is None)
    assert checked(Sampling(do_sample=True, top_p=0.5)).do_sample is True


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.7, "do_sample": False}, "temperature=0.7 without drawing"),
        ({"top_k": 5, "do_sample": False}, "top_k=5 without drawing"),
        ({"temperature": -1.0, "do_sample": True}, "temperature=-1.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        checked(Sampling(**settings))
