"""Experts of vLLM with factors at 1, 2 and 4 ranks, in one process, by numbers; what cannot be served is refused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from support.strategies import random_factors
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.factors import SIGN_NAMES, DoubleBinaryFactors
from dbf_compile.integrations.transformers import layer_table
from dbf_compile.integrations.vllm.experts import ExpertsMethod
from dbf_compile.signs import interleave

K, INNER, EXPERTS = 48, 64, 3  # vLLM computes activations of 16 columns at once
Weights = dict[str, DoubleBinaryFactors | Tensor]


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def weights_of(down: str = "down_proj") -> Weights:
    """Return factors of all experts; the second one's down projection is dense."""
    weights: Weights = {}
    for number in range(EXPERTS):
        weights[f"gate_up_proj.{number}"] = random_factors(K, 33, 2 * INNER, number)
        weights[f"{down}.{number}"] = random_factors(INNER, 30, K, number + 10)
    weights[f"{down}.1"] = torch.randn(K, INNER, generator=torch.Generator().manual_seed(0))
    return weights


def experts(weights: Weights, rank: int, ranks: int, **settings: Any) -> Any:
    """Return what stands for a layer of vLLM, with empty experts."""
    factors = {f"mlp.experts.{name}": one for name, one in weights.items() if not isinstance(one, Tensor)}
    parallel = SimpleNamespace(tp_rank=rank, tp_size=ranks, use_ep=settings.pop("use_ep", False))
    moe = SimpleNamespace(
        moe_parallel_config=parallel, is_act_and_mul=True, has_bias=settings.pop("has_bias", False)
    )
    layer: Any = nn.Module()
    layer.layer_name, layer.activation, layer.apply_router_weight_on_input = (
        "mlp.experts",
        MoEActivation.SILU,
        False,
    )
    layer.quant_method = ExpertsMethod(moe, "mlp.experts", layer_table(factors))
    layer.quant_method.create_weights(layer, EXPERTS, K, INNER // ranks, torch.float32)
    return layer


def load(layer: Any, weights: Weights) -> Any:
    tensors = []
    for name, one in weights.items():
        stored = {"weight": one} if isinstance(one, Tensor) else one.tensors()
        for key, tensor in stored.items():
            tensors.append((f"{name}.{key}", interleave(tensor) if key in SIGN_NAMES else tensor))
    assert list(layer.load_weights(tensors)) == [name for name, _ in tensors]
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("down", ["down_proj", "w2"])
def test_tokens_go_through_their_experts_and_ranks_add_up(down: str, ranks: int) -> None:
    weights = weights_of(down)
    generator = torch.Generator().manual_seed(1)
    x, shares = torch.randn(6, K, generator=generator), torch.rand(6, 2, generator=generator)
    index = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0], [0, 1]])
    dense = {
        name: one.double() if isinstance(one, Tensor) else one.dense(torch.float64)
        for name, one in weights.items()
    }
    expected = torch.zeros(6, K, dtype=torch.float64)
    for token in range(6):
        for share, number in zip(shares[token], index[token].tolist(), strict=True):
            gate, up = (dense[f"gate_up_proj.{number}"] @ x[token].double()).chunk(2)
            expected[token] += share * (dense[f"{down}.{number}"] @ (nn.functional.silu(gate) * up))
    total = torch.zeros(6, K, dtype=torch.float64)
    for rank in range(ranks):
        layer = load(experts(weights, rank, ranks), weights)
        total += layer.quant_method.apply(layer, x, shares, index).double()
    assert (total - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_cannot_be_served_or_is_missing_is_refused() -> None:
    weights = weights_of()
    with pytest.raises(ConversionError, match="split over ranks as wholes"):
        experts(weights, 0, 1, use_ep=True)
    with pytest.raises(ConversionError, match="with biases"):
        experts(weights, 0, 1, has_bias=True)
    with pytest.raises(CheckpointError, match=r"'gate_up_proj\.7\.signs_in' of mlp\.experts"):
        list(experts(weights, 0, 1).load_weights([("gate_up_proj.7.signs_in", torch.empty(0))]))
    with pytest.raises(CheckpointError, match=r"'mlp\.experts\.gate_up_proj\.2' without signs_in"):
        load(experts(weights, 0, 1), {name: one for name, one in weights.items() if name != "gate_up_proj.2"})
