"""Layers of vLLM as one rank of several has them, in one process, and the loading of their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.parameter as vllm_parameter
from torch import Tensor

from dbf_compile.factors import FIRST_STAGE, SIGN_NAMES, DoubleBinaryFactors
from dbf_compile.integrations.transformers import DBFConfig, layer_table
from dbf_compile.integrations.vllm.config import VLLMConfig
from dbf_compile.signs import interleave

Weights = Mapping[str, DoubleBinaryFactors | Tensor]


def as_rank(patch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    """Let layers that are made from now on be those of a rank."""
    for module in (vllm_linear, vllm_parameter):
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)


def config_of(weights: Weights, fused: Mapping[str, Sequence[str]]) -> VLLMConfig:
    factors = {f"block.{name}": one for name, one in weights.items() if isinstance(one, DoubleBinaryFactors)}
    config = VLLMConfig(DBFConfig(layer_table(factors)))
    config.packed_modules_mapping = {name: list(parts) for name, parts in fused.items()}
    return config


def load(layer: Any, weights: Weights, shards: Sequence[str | int | None]) -> Any:
    """Give a layer the tensors of its projections as vLLM does, and let it finish."""
    owners: dict[int, str] = {}
    for (name, one), shard in zip(weights.items(), shards, strict=True):
        if isinstance(one, Tensor):
            stored = {"weight": one}
        else:
            owner = owners.setdefault(id(one.signs_in), name)
            stored = {"weight": torch.empty(one.out_features, 0)} | {
                key: interleave(tensor) if key in SIGN_NAMES else tensor
                for key, tensor in one.tensors().items()
                if owner == name or key not in FIRST_STAGE
            }
        for key, tensor in stored.items():
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def dense(weights: Weights) -> list[Tensor]:
    return [one.double() if isinstance(one, Tensor) else one.dense(torch.float64) for one in weights.values()]
