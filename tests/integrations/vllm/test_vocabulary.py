"""Embeddings and heads of vLLM that read tables, or have factors, at 1, 2 and 4 ranks, by numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
from support.strategies import random_factors
from vllm.config import VllmConfig, set_current_vllm_config

from dbf_compile.errors import CheckpointError
from dbf_compile.factors import SIGN_NAMES
from dbf_compile.integrations.transformers import DBFConfig, layer_table
from dbf_compile.integrations.vllm.config import VLLMConfig
from dbf_compile.rows import ROW_FORMATS
from dbf_compile.signs import interleave
from dbf_compile.tables import QuantizedRows

V, K = 300, 70  # filled up to 320 rows: the last of four ranks has 60, and 20 of zeros
RANKS = (1, 2, 4)


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    def become(rank: int, ranks: int) -> None:
        monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(vllm_vocabulary, "tensor_model_parallel_all_reduce", lambda x: x)

    return become


def config_of(kind: str) -> VLLMConfig:
    entries = {
        "embed_tokens": {"kind": kind, "shares_rows_with": None},
        "lm_head": {"kind": kind, "shares_rows_with": "embed_tokens"},
    }
    return VLLMConfig(DBFConfig({}, tables=entries))


def load(layer: Any, tensors: dict[str, Tensor]) -> Any:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ROW_FORMATS)
def test_an_embedding_and_the_head_that_is_tied_to_it(kind: str, ranks: int, as_rank: Any) -> None:
    table = QuantizedRows.of(torch.randn(V, K, generator=torch.Generator().manual_seed(0)), kind)
    dense = table.dense(torch.float64)
    ids = torch.tensor([0, 1, 79, 80, 159, 160, 299])
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    rows, logits = torch.zeros(len(ids), K, dtype=torch.float64), []
    for rank in range(ranks):
        as_rank(rank, ranks)
        config = config_of(kind)
        embedding = vllm_vocabulary.VocabParallelEmbedding(V, K, quant_config=config)
        head = vllm_vocabulary.ParallelLMHead(V, K, quant_config=config, prefix="lm_head").tie_weights(
            embedding
        )
        load(embedding, {"weight": torch.empty(V, 0), "rows": table.rows})
        assert head.rows is embedding.rows
        rows += embedding(ids).double()
        logits.append(head.quant_method.apply(head, x))
    torch.testing.assert_close(rows, dense[ids], rtol=1e-6, atol=1e-6)
    result = torch.cat(logits, 1)
    assert result.shape == (5, 320) and not result[:, V:].any()
    torch.testing.assert_close(result[:, :V].double(), x.double() @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_factored_head(ranks: int, as_rank: Any) -> None:
    factors = random_factors(K, 53, V)
    tensors = {
        name: interleave(tensor) if name in SIGN_NAMES else tensor
        for name, tensor in factors.tensors().items()
    }
    x, logits = torch.randn(5, K, generator=torch.Generator().manual_seed(1)), []
    for rank in range(ranks):
        as_rank(rank, ranks)
        config = VLLMConfig(DBFConfig(layer_table({"lm_head": factors})))
        head = vllm_vocabulary.ParallelLMHead(V, K, quant_config=config, prefix="lm_head")
        load(head, {"weight": torch.empty(V, 0), **tensors})
        logits.append(head.quant_method.apply(head, x))
    expected = x.double() @ factors.dense(torch.float64).T
    result = torch.cat(logits, 1)
    assert not result[:, V:].any()
    assert (result[:, :V].double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_dense_embedding_beside_a_head_of_a_table(as_rank: Any) -> None:
    as_rank(0, 1)
    weight = torch.randn(V, K)
    embedding = vllm_vocabulary.VocabParallelEmbedding(V, K, quant_config=config_of("int8"))
    load(embedding, {"weight": weight})
    assert torch.equal(embedding(torch.tensor([3, 299])), weight[[3, 299]])
    logits = embedding.quant_method.apply(embedding, weight[:2])
    torch.testing.assert_close(logits[:, :V], weight[:2] @ weight.T, rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_of_another_size_is_named(as_rank: Any) -> None:
    as_rank(0, 1)

    def head() -> Any:
        return vllm_vocabulary.ParallelLMHead(V, K, quant_config=config_of("int8"), prefix="lm_head")

    with pytest.raises(CheckpointError, match="'lm_head' without rows"):
        load(head(), {"weight": torch.empty(V, 0)})
    with pytest.raises(CheckpointError, match="lm_head: rows of 20 rows; allowed: 300"):
        load(head(), {"rows": torch.empty(20, 19, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="tables of rows of 70 columns"):
        load(head(), {"rows": torch.empty(V, 3, dtype=torch.int32)})
