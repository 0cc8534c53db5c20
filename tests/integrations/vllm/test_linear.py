"""Layers of vLLM with factors at 1, 2 and 4 ranks, in one process, by numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
import vllm.model_executor.layers.linear as vllm_linear
from support.strategies import random_factors
from support.vllm_layers import Weights, config_of, dense, load
from support.vllm_layers import as_rank as become
from vllm.config import VllmConfig, set_current_vllm_config

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.integrations.vllm.linear import _load
from dbf_compile.kernels.sign_matmul import cpu_kernel

K, HEAD = 88, 24  # 44 and 22 columns a rank, 24 rows a head: no multiples of 32 or 16
RANKS = (1, 2, 4)


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    # What a rank computes is what is asked for here.
    monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda x: x)
    return partial(become, monkeypatch)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual.double() - expected).abs().max() <= tolerance * expected.abs().max())


def projections(kind: str) -> Weights:
    """Return q, k and v of 4, 2 and 2 heads."""
    rows = [4 * HEAD, 2 * HEAD, 2 * HEAD]
    generator = torch.Generator().manual_seed(1)
    if kind == "shared":
        return dict(zip("qkv", random_factors(K, 53, sum(rows)).split(rows), strict=True))
    parts: dict[str, Any] = {
        name: random_factors(K, 40 + 9 * index, count, index)
        for index, (name, count) in enumerate(zip("qkv", rows, strict=True))
    }
    if kind == "dense between":
        parts["k"] = torch.randn(rows[1], K, generator=generator)
    if kind == "shared around":  # v has the first stage of q, and k lies between
        parts["q"], parts["v"] = random_factors(K, 53, rows[0] + rows[2]).split([rows[0], rows[2]])
    return parts


QKV_KINDS = ("shared", "own", "dense between", "shared around")


def qkv_layer(weights: Weights, bias: bool = False) -> Any:
    return vllm_linear.QKVParallelLinear(
        K,
        HEAD,
        4,
        2,
        bias=bias,
        quant_config=config_of(weights, {"qkv_proj": tuple("qkv")}),
        prefix="block.qkv_proj",
    )


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", QKV_KINDS)
def test_queries_keys_and_values(
    kind: str, ranks: int, kernel: bool, as_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(cpu_kernel, "available", lambda: False)
    weights = projections(kind)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    heads = [(x.double() @ weight.T).view(5, -1, HEAD) for weight in dense(weights)]
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = load(qkv_layer(weights), weights, "qkv")
        own = [
            part.chunk(count, 1)[rank * count // ranks]
            for part, count in zip(heads, (ranks, min(ranks, 2), min(ranks, 2)), strict=True)
        ]
        y, _ = layer(x)
        assert close(y, torch.cat(own, 1).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_biases_are_added_before_the_sum_is_rounded(dtype: torch.dtype, as_rank: Any) -> None:
    as_rank(0, 1)
    weights = projections("own")
    layer = load(qkv_layer(weights, bias=True), weights, "qkv")
    layer.bias.data = torch.randn(len(layer.bias), generator=torch.Generator().manual_seed(2)).to(dtype)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double() @ torch.cat(dense(weights)).T + layer.bias.double()
    y, _ = layer(x)
    assert y.dtype == dtype and y.shape == expected.shape
    assert close(y, expected, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("mixed", [False, True])
def test_gate_and_up(mixed: bool, ranks: int, as_rank: Any) -> None:
    rows = 4 * 22
    gate, up = random_factors(K, 53, 2 * rows).split([rows, rows])
    weights: Weights = {"gate": gate, "up": torch.randn(rows, K) if mixed else up}
    x = torch.randn(5, K)
    expected = [x.double() @ weight.T for weight in dense(weights)]
    for rank in range(ranks):
        as_rank(rank, ranks)
        config = config_of(weights, {"gate_up_proj": ("gate", "up")})
        layer = load(
            vllm_linear.MergedColumnParallelLinear(
                K, [rows, rows], bias=False, quant_config=config, prefix="block.gate_up_proj"
            ),
            weights,
            (0, 1),
        )
        y, _ = layer(x)
        assert close(y, torch.cat([part.chunk(ranks, 1)[rank] for part in expected], 1))


@pytest.mark.parametrize("ranks", RANKS)
def test_projections_that_the_folder_has_as_one(ranks: int, as_rank: Any) -> None:
    """As those of Phi-3: one weight on disk, of which each rank has heads of q, k and v."""
    sizes = [4 * HEAD, 2 * HEAD, 2 * HEAD]
    weights: Weights = {"qkv_proj": random_factors(K, 53, sum(sizes))}
    x = torch.randn(5, K)
    parts = (x.double() @ dense(weights)[0].T).split(sizes, 1)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = vllm_linear.QKVParallelLinear(
            K,
            HEAD,
            4,
            2,
            bias=False,
            quant_config=config_of(weights, {"qkv_proj": ["qkv_proj"]}),
            prefix="block.qkv_proj",
        )
        y, _ = load(layer, weights, [None])(x)
        counts = (ranks, min(ranks, 2), min(ranks, 2))
        own = [part.chunk(n, 1)[rank * n // ranks] for part, n in zip(parts, counts, strict=True)]
        assert close(y, torch.cat(own, 1))


@pytest.mark.parametrize("ranks", RANKS)
def test_row_parallel_parts_add_up_and_the_bias_counts_once(ranks: int, as_rank: Any) -> None:
    weights: Weights = {"o": random_factors(K, 53, 70)}
    x, bias = torch.randn(5, K), torch.randn(70)
    total = torch.zeros(5, 70, dtype=torch.float64)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = vllm_linear.RowParallelLinear(
            K, 70, bias=True, quant_config=config_of(weights, {}), prefix="block.o", reduce_results=True
        )
        layer.bias.data = bias
        total += load(layer, weights, [None])(x.chunk(ranks, 1)[rank].contiguous())[0].double()
    assert close(total, x.double() @ dense(weights)[0].T + bias.double())


@pytest.mark.parametrize("kind", [vllm_linear.ReplicatedLinear, vllm_linear.ColumnParallelLinear])
def test_layers_that_are_not_split(kind: Any, as_rank: Any) -> None:
    weights: Weights = {"router": random_factors(K, 53, 70)}
    x = torch.randn(5, K)
    as_rank(1, 2)
    layer = kind(
        K, 70, bias=False, quant_config=config_of(weights, {}), prefix="block.router", disable_tp=True
    )
    y, _ = load(layer, weights, [None])(x)
    assert close(y, x.double() @ dense(weights)[0].T)


def test_a_layer_that_is_dense_is_vllms_own_and_must_be_loaded(as_rank: Any) -> None:
    as_rank(0, 1)
    weights: Weights = {"other": random_factors(K, 53, 70)}

    def dense_layer() -> Any:
        return vllm_linear.ColumnParallelLinear(
            K, 70, bias=False, quant_config=config_of(weights, {}), prefix="block.up"
        )

    with pytest.raises(CheckpointError, match=r"block\.up without weight"):
        load(dense_layer(), {}, [])
    weight, x = torch.randn(70, K), torch.randn(5, K)
    y, _ = load(dense_layer(), {"up": weight}, [None])(x)
    assert close(y, x.double() @ weight.double().T)


def test_what_is_missing_or_damaged_is_named(as_rank: Any) -> None:
    as_rank(0, 1)
    weights = projections("shared")
    incomplete = {name: one for name, one in weights.items() if name != "v"}
    with pytest.raises(CheckpointError, match=r"'block\.v' without signs_out, scale_out"):
        load(qkv_layer(weights), incomplete, "qk")
    infinite = random_factors(K, 53, 96)
    infinite.scale_out[3] = torch.inf
    weights = {**projections("own"), "q": infinite}
    with pytest.raises(CheckpointError, match=r"'block\.q'.*NaN or infinite"):
        load(qkv_layer(weights), weights, "qkv")


def test_first_stages_of_other_layers_and_unknown_parts_are_refused(as_rank: Any) -> None:
    as_rank(0, 1)
    weights = projections("shared")
    config = config_of(weights, {})
    with pytest.raises(ConversionError, match="shares its first stage with"):
        vllm_linear.ColumnParallelLinear(K, 2 * HEAD, bias=False, quant_config=config, prefix="block.k")
    with pytest.raises(ConversionError, match="of 3 parts, for 2 layers"):
        vllm_linear.QKVParallelLinear(
            K, HEAD, 4, 2, bias=False, quant_config=config_of(weights, {"qkv": "qk"}), prefix="block.qkv"
        )
    layer = load(qkv_layer(weights), weights, "qkv")
    weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ConversionError, match="weights that are loaded once"):
        _load(layer, weight, torch.empty(0), "q")
    with pytest.raises(ConversionError, match="part None"):
        load(qkv_layer(weights), weights, [None, None, None])
