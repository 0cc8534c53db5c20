"""Embeddings and heads of vLLM that read tables of quantized rows.

A rank holds the rows of its part of the vocabulary, filled up with zeros where vLLM pads it. An embedding does not know its name in
the folder: what is loaded tells whether it reads a table, and the width of a row tells of which kind.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from dbf_compile import row_ops as row_ops  # registers the operator
from dbf_compile.errors import CheckpointError
from dbf_compile.integrations.loading import DAMAGED
from dbf_compile.integrations.vllm.sharding import take_interleaved_rows, take_rows
from dbf_compile.linear import WEIGHT_PLACEHOLDER
from dbf_compile.rows import ROW_FORMATS, RowFormat, read_rows
from dbf_compile.tables import ROWS


class VocabularyMethod(QuantizeMethodBase):
    """Serves an embedding or a head that has a table, or a dense weight, as the folder has it."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give the layer two empty parameters, of which one will be filled."""
        for name, dtype in ((WEIGHT_PLACEHOLDER, params_dtype), (ROWS, torch.int32)):
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.tensor_name = name
            parameter.weight_loader = MethodType(_load, layer)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that a table or a weight was loaded.

        Raises:
            CheckpointError: there is none.
        """
        if not layer.rows.numel() and not layer.weight.numel():
            name = layer.prefix or type(layer).__name__
            raise CheckpointError(f"layer {name!r} without {ROWS}", "its table, or its weight", DAMAGED)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows [..., K] for ids [...] of this rank."""
        if not layer.rows.numel():
            return nn.functional.embedding(input_, layer.weight)
        return read_rows(layer.rows, input_, layer.embedding_dim, _form(layer), layer.weight.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits [..., N] of this rank for x [..., K], in the dtype of x."""
        if not layer.rows.numel():
            return nn.functional.linear(x, layer.weight, bias)
        form = _form(layer)
        y: Tensor = torch.ops.dbf.row_matmul(x, layer.rows, form.bits, form.group, bias, x.dtype)
        return y

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """Let a head read the table of the embedding."""
        for name in (WEIGHT_PLACEHOLDER, ROWS):
            layer.register_parameter(name, getattr(embed_tokens, name))
        return layer  # type: ignore[no-any-return]


def _form(layer: Any) -> RowFormat:
    return ROW_FORMATS[_kind(layer, layer.rows)]


def _kind(layer: Any, rows: Tensor) -> str:
    """Return the format of a table: rows of one width have one in each."""
    for kind, form in ROW_FORMATS.items():
        if rows.shape[1] == form.words(layer.embedding_dim):
            return kind
    raise CheckpointError(
        f"{layer.prefix or 'an embedding'}: {ROWS} of shape {tuple(rows.shape)}",
        f"tables of rows of {layer.embedding_dim} columns",
        DAMAGED,
    )


def _load(layer: Any, parameter: Any, tensor: Tensor) -> None:
    """Take a table or a dense weight of all ranks, and keep the rows of this one."""
    name = parameter.tensor_name
    if len(tensor) != layer.org_vocab_size:
        raise CheckpointError(
            f"{layer.prefix or 'an embedding'}: {name} of {len(tensor)} rows",
            f"{layer.org_vocab_size} rows",
            DAMAGED,
        )
    if name == WEIGHT_PLACEHOLDER and not tensor.numel():
        return  # beside a table
    indices = layer.shard_indices
    ranges = [slice(indices.org_vocab_start_index, indices.org_vocab_end_index)]
    take = take_rows
    if name == ROWS:
        _kind(layer, tensor)
        take = take_interleaved_rows
    own = take(tensor, ranges, layer.num_embeddings_per_partition)
    parameter.data = own.to(parameter.device, parameter.dtype, copy=True)
