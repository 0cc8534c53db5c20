"""Which embeddings and heads may read a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dbf_compile.candidates.tables import (
    embeddings,
    heads,
    readers_of,
    reasons_against_tables,
    why_no_table,
)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0 * torch.ones((), dtype=self.weight.dtype)


class OfItsOwn(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, self.weight.abs())


def test_an_embedding_that_does_as_it_says() -> None:
    for layer in (
        nn.Embedding(5, 4),
        nn.Embedding(5, 4, padding_idx=0),
        nn.Embedding(5, 4, sparse=True, scale_grad_by_freq=True),
        Scaled(5, 4),
    ):
        assert why_no_table(layer) is None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (OfItsOwn(5, 4), "whose weight is used in OfItsOwn.forward"),
        (nn.Embedding(5, 4).to(torch.complex64), "complex64"),
    ],
)
def test_others_say_why(layer: nn.Embedding, reason: str) -> None:
    why = why_no_table(layer)
    assert why is not None and reason in why


def test_patched_and_parametrized_ones_say_why() -> None:
    patched, computed, own = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Embedding(5, 4)
    patched.forward = patched.forward  # type: ignore[method-assign]
    torch.nn.utils.parametrizations.weight_norm(computed)

    class Weight(nn.Parameter):
        pass

    own._parameters["weight"] = Weight(own.weight.data)
    assert "a forward of its own" in str(why_no_table(patched))
    assert "computed before every call" in str(why_no_table(computed))
    assert "of type Weight" in str(why_no_table(own))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.types = nn.Embedding(9, 4), nn.Embedding(3, 4)
        self.body, self.tied, self.out = nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(4, 7)
        self.lm_head = nn.Linear(4, 2)
        self.tied.weight = self.tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.tied(self.tokens(ids)), self.types.weight.T)


def test_heads_are_what_a_model_says_what_is_tied_and_what_is_called_so() -> None:
    model = Model()
    assert list(heads(model)) == ["tied", "out", "lm_head"]
    assert list(embeddings(model)) == ["tokens", "types"]
    reasons = reasons_against_tables(model)
    assert list(reasons) == ["types"] and "used without a call" in reasons["types"]
    readers = readers_of(model, ["tokens", "out"])
    assert readers[id(model.tokens.weight)] == ["tokens", ""] and readers[id(model.out.weight)] == ["out"]
