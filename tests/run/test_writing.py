"""Text that models write themselves: the same for the same seed, whole, without what is barred, and from the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from support.models.pretrained import tiny_tokenizer
from support.models.tiny import tiny_bert, tiny_gpt2, tiny_llama

from dbf_compile.errors import ConversionError, WeightError
from dbf_compile.integrations import steps
from dbf_compile.integrations.generation_settings import UnsuitedError
from dbf_compile.options import Sampling
from dbf_compile.run import writing
from dbf_compile.run.writing import Writer

LENGTH = 40


def writer_of(model: Any, **sampling: Any) -> Writer:
    return Writer.of(
        model.eval(), None, LENGTH, Sampling(**{"temperature": 1.0, "top_k": 20, "seed": 0, **sampling})
    )


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2, mamba], ids=["llama", "gpt2", "mamba"])
def model(request: Any) -> Any:
    return request.param()


def test_equal_seeds_write_alike_whatever_is_written_beside(model: Any) -> None:
    steps_of: list[int] = []
    whole = writer_of(model).write(range(6), steps_of.append)
    assert whole.shape == (6, LENGTH) and whole.dtype == torch.int64 and sum(steps_of) == 6 * LENGTH
    assert torch.equal(whole, writer_of(model).write(range(6)))
    assert len({tuple(row) for row in whole.tolist()}) == 6
    assert not torch.equal(whole, writer_of(model, seed=1).write(range(6)))
    # Sums of fewer rows may round otherwise, but what the rows begin with is theirs.
    assert torch.equal(whole[4:, :1], writer_of(model).write(range(4, 6))[:, :1])


def test_tokens_are_drawn_from_the_likeliest(model: Any) -> None:
    rows = writer_of(model, top_k=3).write(range(4))
    with torch.no_grad():
        likeliest = model(rows).logits.topk(4).indices  # one more, as sums may round otherwise
    drawn = (likeliest[:, :-1] == rows[:, 1:, None]).any(-1)
    assert drawn.float().mean() > 0.98


def test_both_ways_write_the_same(monkeypatch: Any) -> None:
    model = tiny_llama()
    ours = writer_of(model, temperature=0.2).write(range(3))

    def refuse(_: Any) -> None:
        raise UnsuitedError("it is another")

    monkeypatch.setattr(steps, "probe", refuse)
    theirs = writer_of(model, temperature=0.2).write(range(3))
    assert (ours == theirs).float().mean() > 0.9


def test_where_a_text_ends_the_next_begins_and_no_text_is_too_short(monkeypatch: Any) -> None:
    monkeypatch.setattr(writing, "_SHORTEST", 5)
    writer = replace(writer_of(tiny_llama(), top_k=0, temperature=5.0), ends=frozenset(range(128)))
    openings = replace(writer.openings, plain=(200, 201))
    rows = replace(writer, openings=openings).write(range(3)).tolist()
    for row in rows:
        texts, begun = [], 0
        for place, token in enumerate(row):
            if token < 128:  # it ends a text
                texts.append(row[begun : place + 1])
                begun = place + 1
        assert len(texts) > 2 and all(text[0] in (200, 201) and len(text) >= 5 for text in texts)


def test_turns_of_a_conversation_follow_what_the_model_says() -> None:
    plain = writer_of(tiny_llama(), top_k=0, temperature=5.0)
    turns = ((7, 250, 251), (9, 252), (9, 253))
    openings = replace(plain.openings, conversation=turns, words={})
    writer = replace(plain, openings=openings, ends=frozenset({9, *range(10, 100)}))
    (row,) = writer.write(range(1)).tolist()
    assert row[:3] == [7, 250, 251]
    text = " ".join(map(str, row))
    assert "252" in text and "253" in text and text.index("252") < text.index("253")
    place = row.index(252)  # behind the token that the piece begins with, or behind the whole piece
    assert row[place - 1] == 9


def test_what_is_barred_is_never_written() -> None:
    writer = replace(writer_of(tiny_llama(), top_k=0), barred=tuple(range(128)))
    assert int(writer.write(range(4))[:, 1:].min()) >= 128


def test_models_that_write_nothing_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConversionError, match=r"BertModel is to write itself; .*pass data="):
        writer_of(tiny_bert())


def test_ids_that_no_text_has_are_neither_drawn_nor_begun_with_nor_waited_for() -> None:
    model = tiny_llama(1, vocab_size=512)  # a head with more rows than there are tokens
    model.config.image_token_id = (
        model.config.vocab_size
    )  # some configurations name ids behind the vocabulary
    model.generation_config.eos_token_id = [-1, 600]  # type: ignore[union-attr]
    writer = Writer.of(model.eval(), tiny_tokenizer(), LENGTH, Sampling(temperature=5.0, top_k=0, seed=0))
    assert int(writer.write(range(8)).max()) < 256 and not writer.ends


def test_logits_that_are_no_numbers_are_no_text() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(WeightError, match="NaN or infinite"):
        writer_of(model).write(range(2))


def test_the_fingerprint_says_what_the_text_depends_on() -> None:
    model = tiny_llama()
    prints = [
        writer_of(model, **change).fingerprint() for change in ({}, {}, {"seed": 1}, {"temperature": 0.5})
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3
