"""Linear layers whose both stages are split over ranks, for ``additional_config={"dbf": {"split_stages": True}}``.

    column    h = gather(signs_in[own R] · (scale_in ⊙ x));      y = scale_out ⊙ (signs_out[own N] · (scale_mid ⊙ h))
    row       h = scatter(Σ signs_in[:, own K] · (scale_in ⊙ x));  y = scale_out ⊙ (signs_out[:, own R] · (scale_mid ⊙ h))

Each rank then holds and reads 1 / ranks of the signs, for a collective more a layer, of R numbers a token. Of Llama-3.1-8B at 2
bits a rank holds 0.25 instead of 0.41 on four ranks, and 0.125 instead of 0.31 on eight. A block has 54 MB of signs: where
memory is read with 10 GB/s four ranks save 0.9 ms, and four collectives cost 0.4 ms at 0.1 ms each; with 3 TB/s they save 3 µs,
and cost more. So this is for ranks of CPUs, and for models that else do not fit. Calculated, not measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_reduce_scatter,
)
from vllm.model_executor.layers.linear import RowParallelLinear

from dbf_compile.factors import TENSOR_NAMES
from dbf_compile.integrations.vllm.linear import FactoredLinearMethod
from dbf_compile.integrations.vllm.sharding import middle_range, take_interleaved_rows
from dbf_compile.signs import WORD_BITS, deinterleave, interleave, slice_columns


class SplitLinearMethod(FactoredLinearMethod):
    """Serves a layer of several ranks, both stages split; a layer of one rank as ever."""

    def create_weights(
        self, layer: Any, input_size_per_partition: int, *sizes: Any, **attributes: Any
    ) -> None:
        """Create what is loaded, and count what a rank will hold."""
        super().create_weights(layer, input_size_per_partition, *sizes, **attributes)
        if layer.tp_size > 1:
            self.own_bits = -(-self.whole_bits // layer.tp_size)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put together what a layer computes with, and keep this rank's part of the middle dimension.

        Raises:
            CheckpointError: tensors are missing, or are no factors.
        """
        super().process_weights_after_loading(layer)
        if layer.tp_size == 1:
            return
        layer.dbf_prepared, layer.dbf_kept = None, []
        layer.dbf_middles = []
        row = isinstance(layer, RowParallelLinear)
        for number, group in enumerate(layer.dbf_groups):
            if len(group) > 1:
                parts = _split(dict(zip(TENSOR_NAMES, group, strict=True)), row, layer.tp_rank, layer.tp_size)
                layer.dbf_middles.append(len(group[3]))
                for name, tensor in parts.items():
                    layer.register_parameter(f"{name}_{number}", nn.Parameter(tensor, requires_grad=False))
                layer.dbf_groups[number] = tuple(getattr(layer, f"{name}_{number}") for name in TENSOR_NAMES)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y [..., N] for x [..., K] of this rank, in the dtype of x."""
        if layer.tp_size == 1:
            y: Tensor = super().apply(layer, x, bias)
            return y
        flat, dtype = x.flatten(0, -2), x.dtype if bias is None else torch.float32
        y = _product(layer, flat, dtype).unflatten(0, x.shape[:-1])
        return y if bias is None else (y + bias).to(x.dtype)


def _split(tensors: dict[str, Tensor], row: bool, rank: int, ranks: int) -> dict[str, Tensor]:
    """Return a rank's part of a group along R, filled up with zeros where the ranks' parts are not equal."""
    own, count = middle_range(len(tensors["scale_mid"]), rank, ranks)
    middle = len(tensors["scale_mid"])
    if not row:
        return {"signs_in": take_interleaved_rows(tensors["signs_in"], [own], count)}
    words = slice_columns(deinterleave(tensors["signs_out"]), own.start, own.stop)
    return {
        "signs_in": take_interleaved_rows(tensors["signs_in"], [slice(0, middle)], count * ranks),
        "scale_mid": nn.functional.pad(tensors["scale_mid"][own], (0, count - (own.stop - own.start))),
        "signs_out": interleave(nn.functional.pad(words, (0, count // WORD_BITS - words.shape[1]))),
    }


def _product(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    fast = x.dtype.itemsize < 4
    multiply = torch.ops.dbf.sign_matmul
    factored = [group for group in layer.dbf_groups if len(group) > 1]
    parts = [multiply(x, group[0], group[2], interleaved=True, fast=fast) for group in factored]
    if isinstance(layer, RowParallelLinear):
        (h,) = parts
        count = h.shape[-1] // layer.tp_size
        if x.is_cuda:
            inner = [tensor_model_parallel_reduce_scatter(h, -1)]
        else:  # not every backend of CPUs can scatter
            inner = [tensor_model_parallel_all_reduce(h).narrow(-1, layer.tp_rank * count, count)]
    else:
        gathered = tensor_model_parallel_all_gather(torch.cat(parts, -1), -1)
        ranks = gathered.unflatten(-1, (layer.tp_size, -1)).split([part.shape[-1] for part in parts], -1)
        inner = [
            part.flatten(-2).narrow(-1, 0, middle)
            for part, middle in zip(ranks, layer.dbf_middles, strict=True)
        ]
    results, rest = [], iter(inner)
    for group in layer.dbf_groups:
        if len(group) == 1:
            results.append(nn.functional.linear(x, group[0]).to(dtype))
        else:
            _, signs_out, _, scale_mid, scale_out = group
            results.append(multiply(next(rest), signs_out, scale_mid, scale_out, None, dtype, True, fast))
    return torch.cat(results, -1) if len(results) > 1 else results[0]
