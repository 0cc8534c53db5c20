"""Experts of vLLM, each with linear layers of its own, as folders have them: "<experts>.down_proj.3".

    y[t] = Σ_j  p[t, j] · down_e( act( gate_up_e(x[t]) ) )          e = index[t, j], the experts that token t goes to

Which experts run depends on the data, and only those are read. So a GPU's graphs cannot capture them, and ranks split every expert,
not the set of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.integrations.loading import DAMAGED, Layers
from dbf_compile.integrations.vllm.linear import Projection, finish, product
from dbf_compile.integrations.vllm.sharding import Shard, own_range, own_ranges

# What vLLM's Mixtral calls them.
_NAMES = {"w2": "down_proj"}
_TENSOR = re.compile(r"(gate_up_proj|up_proj|down_proj|w2)\.(\d+)\.(\w+)$")


class ExpertsMethod(FusedMoEMethodBase):
    """Serves the experts of one layer.

    Args:
        moe: settings of vLLM.
        prefix: name of the experts in the folder.
        layers: the folder's table.
    """

    def __init__(self, moe: Any, prefix: str, layers: Layers) -> None:
        super().__init__(moe)
        self._prefix, self._layers = prefix, layers

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give each expert layers without content.

        Raises:
            ConversionError: experts that cannot be served yet.
        """
        self._refuse(layer)
        parallel = self.moe.moe_parallel_config
        own, gates = intermediate_size_per_partition, 2 if self.moe.is_act_and_mul else 1
        whole = own * parallel.tp_size
        columns = own_range(whole, own, parallel.tp_rank, parallel.tp_size)
        rows = own_ranges([whole] * gates, [own] * gates, parallel.tp_rank, parallel.tp_size)
        up = Shard(gates * whole, hidden_size, rows, slice(0, hidden_size), gates * own)
        down = Shard(hidden_size, whole, [slice(0, hidden_size)], columns, hidden_size)
        for name, shard in (("gate_up_proj" if gates == 2 else "up_proj", up), ("down_proj", down)):
            experts = [
                _Expert(self._projection(name, number, shard), params_dtype) for number in range(num_experts)
            ]
            layer.add_module(name, nn.ModuleList(experts))
        layer.load_weights = MethodType(_load, layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded, and put it together.

        Raises:
            CheckpointError: tensors are missing, or are no factors.
        """
        for part in _parts(layer).values():
            for expert in part:
                finish(expert, [expert.projection], expert.device)
                expert.projection.tensors.clear()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: no kernel of vLLM is used."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return y [T, K] of this rank for x [T, K], the experts of each token [T, J] and their shares [T, J]."""
        up, down = _parts(layer).values()
        result = torch.zeros_like(x)
        for number in topk_ids.unique().tolist():
            tokens, places = torch.where(topk_ids == number)
            inner = product(up[number], x[tokens], x.dtype)
            size = inner.shape[-1] // (2 if self.moe.is_act_and_mul else 1)
            active = apply_moe_activation(layer.activation, inner.new_empty(len(inner), size), inner)
            part = product(down[number], active, x.dtype) * topk_weights[tokens, places, None]
            result.index_add_(0, tokens, part.to(result.dtype))
        return result

    def _projection(self, name: str, number: int, shard: Shard) -> Projection:
        full = self._name(name, number)
        return Projection(full, self._layers.get(full), shard)

    def _name(self, name: str, number: int) -> str:
        names = [name, *(other for other, ours in _NAMES.items() if ours == name)]
        known = [f"{self._prefix}.{each}.{number}" for each in names]
        return next((each for each in known if each in self._layers), known[0])

    def _refuse(self, layer: Any) -> None:
        current = get_current_vllm_config()
        reasons = {
            "split over ranks as wholes": self.moe.moe_parallel_config.use_ep,
            "with biases": self.moe.has_bias,
            "whose input is weighted": layer.apply_router_weight_on_input,
            "within a GPU's graphs": current.device_config.device_type == "cuda"
            and not current.model_config.enforce_eager,
        }
        for reason, applies in reasons.items():
            if applies:
                raise ConversionError(
                    f"{self._prefix}: factored experts {reason}",
                    "experts without biases, tensor parallelism, and enforce_eager=True on GPUs",
                    "serve it so, or compress the model with skip=['*experts*']",
                )


class _Expert(nn.Module):
    """A linear layer of an expert."""

    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        super().__init__()
        self.projection, self.params_dtype = projection, dtype
        self.device = torch.empty(0).device  # vLLM builds models within that of their weights


def _parts(layer: Any) -> Mapping[str, Any]:
    return {name: part for name, part in layer.named_children() if isinstance(part, nn.ModuleList)}


def _load(layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Load tensors of experts, in place of what vLLM's layer does for fused ones; yield their names."""
    parts = _parts(layer)
    for name, tensor in weights:
        match = _TENSOR.search(name)
        part = parts.get(_NAMES.get(match[1], match[1])) if match else None
        if match is None or part is None or int(match[2]) >= len(part):
            raise CheckpointError(f"a tensor {name!r} of {layer.layer_name}", "those of its experts", DAMAGED)
        part[int(match[2])].projection.load(match[3], tensor)
        yield name
