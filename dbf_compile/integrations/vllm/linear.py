"""Linear layers of vLLM that are factored, in whole or in part.

A layer of vLLM stands for one projection of a folder or for several: qkv_proj for q, k and v. Each of them is factored or dense,
and has a first stage of its own or that of another. Neighbours of one first stage become one sign matrix. A layer has parameters
of the names that a folder's tensors have, without content, as vLLM loads by name. Their loader cuts what it is given; what
the layer computes with comes in their place once all is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from dbf_compile.errors import CheckpointError, ConversionError, FactorsError
from dbf_compile.factors import FIRST_STAGE, SIGN_NAMES, TENSOR_NAMES, DoubleBinaryFactors
from dbf_compile.integrations.loading import DAMAGED, SCALES, Layers
from dbf_compile.integrations.vllm.sharding import (
    Shard,
    check_complete,
    check_tensor,
    cut,
    own_range,
    own_ranges,
    sign_bits,
)
from dbf_compile.kernels.sign_matmul import cpu_kernel
from dbf_compile.linear import WEIGHT_PLACEHOLDER
from dbf_compile.ops import double_binary_linear, prepare_layers
from dbf_compile.signs import interleave

_QKV = ("q", "k", "v")


@cache
def _allow_matrix_units() -> None:
    """Let vLLM's attention on CPUs use AMX: a process must ask the system first, or dies of an illegal instruction.

    vLLM leaves that to the dense layers' products of bfloat16, of which a factored model may have none.
    """
    one = torch.ones(64, 64, dtype=torch.bfloat16, device="cpu")
    nn.functional.linear(one, one)


@dataclass
class Projection:
    """One projection of a folder within a layer of vLLM.

    Args:
        name: in the folder.
        entry: of the folder's table of layers; None for a dense one.
        shard: what this rank holds.
        tensors: what was loaded and cut, by name.
    """

    name: str
    entry: Mapping[str, Any] | None
    shard: Shard
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mid_features(self) -> int:
        """R; 0 of a dense projection."""
        return 0 if self.entry is None else int(self.entry["mid_features"])

    @property
    def owner(self) -> str:
        """Name of the projection that has the first stage; that of a dense one is empty."""
        return "" if self.entry is None else self.entry["shares_first_stage_with"] or self.name

    @property
    def expected(self) -> tuple[str, ...]:
        """Names of the tensors that a folder has for it."""
        if self.entry is None:
            return (WEIGHT_PLACEHOLDER,)
        shares = self.owner != self.name
        return tuple(name for name in TENSOR_NAMES if not (shares and name in FIRST_STAGE))

    def load(self, name: str, tensor: Tensor) -> None:
        """Take a tensor of the folder."""
        sizes = (self.shard.columns, self.mid_features, self.shard.rows)
        check_tensor(self.name, name, tensor, sizes)
        if name in self.expected:
            self.tensors[name] = cut(name, tensor, self.shard)


class FactoredLinearMethod(LinearMethodBase):
    """Serves a layer of which at least one projection is factored.

    Args:
        names: of the projections in the folder, in the order of the layer's rows.
        layers: the folder's table.
    """

    def __init__(self, names: Sequence[str], layers: Layers) -> None:
        self.names = names
        self.entries = [layers.get(name) for name in names]
        self.own_bits = self.whole_bits = 0  # signs that this rank holds, and all

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
        """Give the layer empty parameters of the names that the folder has, and a loader that cuts.

        Raises:
            ConversionError: a projection shares its first stage with one of another layer of vLLM, or parts are cut in a way that
                is not known.
        """
        columns = own_range(input_size, input_size_per_partition, layer.tp_rank, layer.tp_size)
        shards = [
            Shard(rows, input_size, own_rows, columns, padded)
            for rows, own_rows, padded in _rows(layer, output_partition_sizes, len(self.names))
        ]
        layer.dbf_projections = [
            Projection(*parts) for parts in zip(self.names, self.entries, shards, strict=True)
        ]
        for one in layer.dbf_projections:
            if one.owner and one.owner not in self.names:
                raise ConversionError(
                    f"layer {one.name!r}, which shares its first stage with {one.owner!r}, another layer in vLLM",
                    f"first stages shared within {', '.join(self.names)}",
                    "compress the model for vLLM with merge_shared_inputs=False",
                )
            own, whole = sign_bits(one.shard, one.mid_features, one.owner == one.name)
            self.own_bits, self.whole_bits = self.own_bits + own, self.whole_bits + whole
        dtypes = {str(entry.get("scale_dtype", "float16")) for entry in self.entries if entry is not None}
        for name in (*TENSOR_NAMES, WEIGHT_PLACEHOLDER):
            dtype = torch.int32 if name in SIGN_NAMES else SCALES[min(dtypes)]
            empty = torch.empty(0, dtype=params_dtype if name == WEIGHT_PLACEHOLDER else dtype)
            parameter: Any = nn.Parameter(empty, requires_grad=False)
            parameter.tensor_name = name
            parameter.weight_loader = MethodType(_load, layer)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded, and put it together.

        Raises:
            CheckpointError: tensors are missing, or are no factors.
        """
        finish(layer, layer.dbf_projections, layer.weight.device)
        _allow_matrix_units()
        for name in TENSOR_NAMES:
            delattr(layer, name)
        del layer.dbf_projections

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y [..., N] for x [..., K] of this rank, in the dtype of x."""
        if bias is None:
            return product(layer, x, x.dtype)
        return (product(layer, x, torch.float32) + bias).to(x.dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Return the layer: a factored head has a weight of its own."""
        return layer


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):
    """Serves a layer that the folder has dense; vLLM does not look whether layers of quantized models were loaded.

    Args:
        names: of the projections in the folder.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def create_weights(self, layer: Any, *args: Any, weight_loader: Any, **attributes: Any) -> None:
        """Create the weight, and note what is loaded."""
        layer.dbf_loaded, layer.dbf_loader = set(), weight_loader
        super().create_weights(layer, *args, weight_loader=MethodType(_load_dense, layer), **attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that the weight was loaded.

        Raises:
            CheckpointError: it was not.
        """
        if None not in layer.dbf_loaded and len(layer.dbf_loaded) < len(self.names):
            raise CheckpointError(
                f"dense layers {', '.join(self.names)} without weight", "all weights", DAMAGED
            )
        super().process_weights_after_loading(layer)


def _rows(layer: Any, own: Sequence[int], count: int) -> list[tuple[int, Sequence[slice], int]]:
    """Return of each projection its rows, the ranges of them that a rank holds, and the number of those with padding."""
    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        rows = slice(indices.org_vocab_start_index, indices.org_vocab_end_index)
        return [(layer.org_vocab_size, [rows], layer.num_embeddings_per_partition)]
    wholes = [layer.output_size]
    if isinstance(layer, QKVParallelLinear):
        keys = layer.total_num_kv_heads
        wholes = [layer.total_num_heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
    elif isinstance(layer, MergedColumnParallelLinear):
        wholes = layer.output_sizes
    if len(wholes) != len(own) or count not in (1, len(wholes)):
        raise ConversionError(
            f"{layer.prefix}, a {type(layer).__name__} of {len(own)} parts, for {count} layers of the folder",
            "one layer of the folder for each part, or one for all",
            "leave these layers dense: name them in skip=[...]",
        )
    if count == 1:
        return [(sum(wholes), own_ranges(wholes, own, layer.tp_rank, layer.tp_size), sum(own))]
    return [
        (whole, [own_range(whole, part, layer.tp_rank, layer.tp_size)], part)
        for whole, part in zip(wholes, own, strict=True)
    ]


def _load(layer: Any, parameter: Any, tensor: Tensor, shard: str | int | None = None) -> None:
    """Load a tensor; vLLM names the part of a merged layer that it belongs to.

    Raises:
        ConversionError: the layer has no such part, or was loaded before.
    """
    projections: list[Projection] | None = getattr(layer, "dbf_projections", None)
    if projections is None:
        raise ConversionError(
            f"weights for {layer.prefix}, which has some",
            "weights that are loaded once",
            "start the engine again",
        )
    index = _QKV.index(shard) if isinstance(shard, str) and shard in _QKV else shard or 0
    if not isinstance(index, int) or (shard is None and len(projections) > 1):
        raise ConversionError(
            f"part {shard!r} of {layer.prefix}",
            f"one of the parts of {', '.join(one.name for one in projections)}",
            "leave these layers dense: name them in skip=[...]",
        )
    projections[index].load(parameter.tensor_name, tensor)


def finish(layer: Any, projections: Sequence[Projection], device: torch.device) -> None:
    """Put together what a layer computes with: groups of neighbours of one first stage, and dense ones.

    Args:
        layer: any module; ``params_dtype`` is the dtype of its dense weights.
        projections: in the order of its rows, loaded.
        device: where the layer computes.

    Raises:
        CheckpointError: tensors are missing, or are no factors.
    """
    by_name = {one.name: one for one in projections}
    for one in projections:
        check_complete(one.name, one.tensors, one.expected)
    stages = {}
    for one in projections:
        if one.entry is not None:
            stage = {name: by_name[one.owner].tensors[name] for name in FIRST_STAGE}
            _check_factors(one.name, {**one.tensors, **stage})
            stages[one.owner] = {**stage, "signs_in": interleave(stage["signs_in"])}
    layer.dbf_groups = []
    for owner, members in groupby(projections, lambda one: one.owner):
        layer.dbf_groups.append(_register(layer, [one.tensors for one in members], stages.get(owner), device))
    _prepare(layer, device)


def _load_dense(layer: Any, parameter: Any, tensor: Tensor, *shard: Any, **named: Any) -> None:
    layer.dbf_loader(parameter, tensor, *shard, **named)
    layer.dbf_loaded.update((*shard, *named.values()) or (None,))


def _check_factors(name: str, tensors: Mapping[str, Tensor]) -> None:
    try:
        DoubleBinaryFactors(**{key: tensors[key] for key in TENSOR_NAMES})
    except FactorsError as error:
        raise CheckpointError(f"layer {name!r}: {error.got}", error.allowed, DAMAGED) from error


def _register(
    layer: Any,
    group: Sequence[Mapping[str, Tensor]],
    stage: Mapping[str, Tensor] | None,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Give the layer parameters of neighbours of one first stage, or of dense ones; return them."""
    if stage is None:
        tensors = {WEIGHT_PLACEHOLDER: torch.cat([one[WEIGHT_PLACEHOLDER] for one in group])}
    else:
        outer = {name: torch.cat([one[name] for one in group]) for name in ("signs_out", "scale_out")}
        tensors = {**stage, **outer, "signs_out": interleave(outer["signs_out"])}
    number = len(layer.dbf_groups)
    for name, tensor in tensors.items():
        dtype = layer.params_dtype if name == WEIGHT_PLACEHOLDER else None
        parameter = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
        layer.register_parameter(f"{name}_{number}", parameter)
    return tuple(getattr(layer, f"{name}_{number}") for name in (TENSOR_NAMES if stage else tensors))


def _prepare(layer: Any, device: torch.device) -> None:
    """Gather what the CPU kernel needs of all factored groups, which it then computes in one call."""
    factored = [group for group in layer.dbf_groups if len(group) > 1]
    prepared = None
    if factored and device.type == "cpu" and cpu_kernel.available():
        # The bytes have addresses of signs: these stay where they are, whatever becomes of the parameters.
        layer.dbf_kept = [tensor.detach() for group in factored for tensor in group]
        prepared = prepare_layers(layer.dbf_kept)
    layer.register_buffer("dbf_prepared", prepared, persistent=False)
    layer.dbf_rows = [len(group[min(1, len(group) - 1)]) for group in layer.dbf_groups]
    layer.dbf_factored_rows = sum(len(group[1]) for group in factored)


def product(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of x [..., K] with a layer's weight, in ``dtype``, without a bias.

    For x of 16 bits sums are fast: the result is rounded by forty times their error.
    """
    groups, fast = layer.dbf_groups, x.dtype.itemsize < 4
    if layer.dbf_prepared is None:
        results = [_apply_group(x, group, dtype, fast) for group in groups]
        return results[0] if len(results) == 1 else torch.cat(results, -1)
    rows = layer.dbf_factored_rows
    y: Tensor = torch.ops.dbf.prepared_layers(x, layer.dbf_prepared, rows, dtype, fast)
    if rows == sum(layer.dbf_rows):
        return y
    results, start = [], 0
    for group, count in zip(groups, layer.dbf_rows, strict=True):
        if len(group) == 1:
            results.append(_apply_group(x, group, dtype, fast))
        else:
            results.append(y.narrow(-1, start, count))
            start += count
    return torch.cat(results, -1)


def _apply_group(x: Tensor, group: Sequence[Tensor], dtype: torch.dtype, fast: bool) -> Tensor:
    if len(group) == 1:
        return nn.functional.linear(x, group[0]).to(dtype)
    signs_in, signs_out, scale_in, scale_mid, scale_out = group
    return double_binary_linear(
        x, signs_in, signs_out, scale_in, scale_mid, scale_out, None, dtype, True, fast
    )
