"""What becomes of embeddings and heads, by the options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dbf_compile
from dbf_compile.candidates import tables as candidates
from dbf_compile.compression.coverage import coverage, left_dense_share
from dbf_compile.compression.tables import make_tables, plan_tables
from dbf_compile.options import CompressionConfig
from dbf_compile.tables import QuantizedEmbedding, QuantizedLinear

FAST: dict[str, Any] = {"iterations": 2, "progress": False, "bits": 3.0}


@pytest.fixture(autouse=True)
def small_tables_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(candidates, "MIN_WEIGHTS", 64 * 32)
    yield


class Model(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(96, 64), nn.Embedding(8, 64)
        self.body, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 96, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.tokens(ids) + self.positions(torch.arange(ids.shape[-1]))))


IDS = torch.arange(8)[None]


def kinds(tied: bool = True, **options: Any) -> dict[str, str]:
    return plan_tables(Model(tied), CompressionConfig(**options)).kinds


def test_the_defaults_quantize_both_and_leave_small_ones() -> None:
    assert kinds() == kinds(tied=False) == {"tokens": "int8", "lm_head": "int8"}
    assert plan_tables(Model(), CompressionConfig()).reasons == {"positions": "too small to gain"}


def test_every_pair_of_options_says_what_it_does() -> None:
    assert kinds(head="int4", embedding="int6") == {"tokens": "int6", "lm_head": "int4"}
    assert kinds(head="int8", embedding="dense") == {"lm_head": "int8"}
    assert kinds(head="dense", embedding="int8", tied=False) == {"tokens": "int8"}
    assert kinds(head=4.0, embedding="int8") == {"tokens": "int8"}
    assert kinds(head="dense", embedding="dense") == {}
    # The dense weight has to be kept anyway.
    assert kinds(head="dense", embedding="int8") == {}


def test_skip_names_what_stays_dense() -> None:
    assert kinds(skip=[]) == {"tokens": "int8", "lm_head": "int8"}
    assert kinds(skip=["tokens"]) == {"lm_head": "int8"} and kinds(skip=["lm_head"]) == {}
    assert kinds(skip=["lm_head"], tied=False) == {"tokens": "int8"} == kinds(skip=["*head"], tied=False)
    assert kinds(skip=["*lm_head", "*body"], tied=False) == {"tokens": "int8"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_converted_as_planned(tied: bool) -> None:
    torch.manual_seed(0)
    model = dbf_compile.convert_(Model(tied), **FAST)
    assert isinstance(model.tokens, QuantizedEmbedding) and isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.body, dbf_compile.DoubleBinaryLinear) and type(model.positions) is nn.Embedding
    assert (model.lm_head.rows is model.tokens.rows) == tied and model(IDS).shape == (1, 8, 96)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_factored_with_its_own_bits(tied: bool) -> None:
    model = dbf_compile.convert_(Model(tied), **FAST, head=6.0, overrides={"*": 2.0})
    assert 5 < model.lm_head.factors.bits_per_weight() <= 6 and model.body.factors.bits_per_weight() <= 2
    assert isinstance(model.tokens, QuantizedEmbedding)


def test_ready_factors_come_without_tables_unless_they_are_asked_for() -> None:
    factors = dbf_compile.factorize_model(Model(), **FAST)
    assert list(factors) == ["body"]
    assert type(dbf_compile.convert_(Model(), factors).tokens) is nn.Embedding
    assert isinstance(
        dbf_compile.convert_(Model(), factors, head="int4", embedding="int4").tokens, QuantizedEmbedding
    )


def test_a_wrapped_model_is_the_same() -> None:
    wrapped = nn.ModuleDict({"module": Model()})
    assert plan_tables(wrapped, CompressionConfig()).kinds == {
        "module.tokens": "int8",
        "module.lm_head": "int8",
    }
    assert plan_tables(wrapped, CompressionConfig(skip=["module.lm_head"])).kinds == {}


def test_what_is_not_there_is_not_quantized() -> None:
    with torch.device("meta"):
        model = Model()
    assert make_tables(model, CompressionConfig()) == {} and kinds() != {}
    assert plan_tables(nn.Embedding(96, 64), CompressionConfig()).kinds == {}


def test_coverage_tells_tables_from_what_is_dense() -> None:
    covered = coverage(Model(), {"body"}, CompressionConfig())
    assert covered["dense"][0]["reason"] == "a table of int8 rows"
    assert left_dense_share(covered) < 0.1 < covered["dense"][0]["share"]
    assert "table" not in str(coverage(Model(), {"body"}, CompressionConfig(), {})["dense"])
