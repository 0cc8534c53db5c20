"""Layers that read tables of quantized rows: the embedding, the head, and the swap of dense ones for them.

A head and an embedding that were tied read one table: they hold the same parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile import row_ops as row_ops  # registers the operator
from dbf_compile.candidates.dense import dense_bias, dense_weight
from dbf_compile.errors import ConversionError, KernelInputError, WeightError
from dbf_compile.linear import WEIGHT_PLACEHOLDER, dense_dtype, on_swap, replace_all
from dbf_compile.rows import ROW_FORMATS, RowFormat, dequantize_rows, quantize_rows, read_rows
from dbf_compile.stand_in import FactoredWeight, StandIn, WithoutWeight

ROWS = "rows"  # name of the parameter


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """A matrix [N, K] as a table of quantized rows.

    Args:
        rows: int32 words [N, words of a row], layout of :mod:`dbf_compile.rows`.
        columns: K.
        kind: name of the format: a key of ``ROW_FORMATS``.
    """

    rows: Tensor
    columns: int
    kind: str

    @staticmethod
    def of(weight: Tensor, kind: str) -> QuantizedRows:
        """Quantize a matrix [N, K]."""
        return QuantizedRows(quantize_rows(weight, ROW_FORMATS[kind]), weight.shape[1], kind)

    @staticmethod
    def empty(rows: int, columns: int, kind: str) -> QuantizedRows:
        """Return a table without content, on the meta device."""
        words = ROW_FORMATS[kind].words(columns)
        return QuantizedRows(torch.empty(rows, words, dtype=torch.int32, device="meta"), columns, kind)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix that the table stands for."""
        return dequantize_rows(self.rows, self.columns, ROW_FORMATS[self.kind], dtype)

    def bits(self) -> int:
        """Return the number of stored bits, scales and padding counted."""
        return 32 * self.rows.numel()


class ReadsRows(WithoutWeight):
    """A layer whose weight is a table of quantized rows: a parameter without gradients, as is an empty ``weight`` [N, 0].

    The empty one has the dtype of the dense weight, and whatever casts a model casts it. It comes first, as others take the
    dtype of a model to be that of its first parameter; and in files a program stops at it that does not know the format.
    """

    rows: nn.Parameter
    kind: str

    def set_rows_(self, weight: Tensor, table: QuantizedRows) -> None:
        """Take a table and the parameter ``weight``, which may be those of another layer."""
        own = {WEIGHT_PLACEHOLDER: _constant(weight), ROWS: _constant(table.rows)}
        vars(self)["_parameters"] = own | {key: p for key, p in self._parameters.items() if key not in own}
        self.kind = table.kind

    @property
    def _empty(self) -> Tensor:
        empty = self._parameters[WEIGHT_PLACEHOLDER]
        assert empty is not None
        return empty

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the dense weight."""
        return self._empty.dtype

    @weight_dtype.setter
    def weight_dtype(self, dtype: torch.dtype) -> None:
        self._parameters[WEIGHT_PLACEHOLDER] = _constant(self._empty.to(dtype))

    @property
    def _device(self) -> torch.device:
        return self.rows.device

    @property
    def weight(self) -> Tensor:
        """What the dense weight looks like; of a layer that is loaded, offloaded or sharded the empty parameter itself."""
        if self._empty.is_meta or "_hf_hook" in vars(self) or type(self._empty) is not nn.Parameter:
            return self._empty
        weight: Any = super().weight
        weight.empty = self._empty
        weight._is_param = True  # whoever ties weights asks for parameters
        weight._is_hf_initialized = True  # else transformers would fill it with random numbers
        return weight  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        if name != WEIGHT_PLACEHOLDER:
            nn.Module.__setattr__(self, name, value)
            return
        if isinstance(value, FactoredWeight):  # tied to a layer that reads a table, too
            value = getattr(value, "empty", value)
        if isinstance(value, nn.Parameter) and value.shape == self._empty.shape:
            self._parameters[WEIGHT_PLACEHOLDER] = value
        else:
            super().__setattr__(name, value)

    @property
    def form(self) -> RowFormat:
        """How the rows are stored."""
        return ROW_FORMATS[self.kind]

    @property
    def table(self) -> QuantizedRows:
        """The table."""
        return QuantizedRows(self.rows, self._dense_shape[1], self.kind)


class QuantizedLinear(ReadsRows, StandIn):
    """A linear layer whose weight is a table of quantized rows: ``y = x Wᵀ + bias``, x [..., K], y [..., N].

    Gradients with respect to x and bias are exact.

    Args:
        weight: empty [N, 0], of the dtype of the dense weight.
        table: of N rows.
        bias: floating point [N], or None.
    """

    def __init__(self, weight: Tensor, table: QuantizedRows, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        self.set_rows_(weight, table)
        self._columns = table.columns

    @property
    def in_features(self) -> int:
        """K, the size of the input."""
        return self._columns

    @property
    def out_features(self) -> int:
        """N, the size of the output."""
        return self.rows.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return the output [..., N] for an input [..., K], in the dtype that a dense layer would return."""
        form, dtype = ROW_FORMATS[self.kind], dense_dtype(input)
        y: Tensor = torch.ops.dbf.row_matmul(input, self.rows, form.bits, form.group, self.bias, dtype)
        return y

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, kind={self.kind!r}"


class QuantizedEmbedding(ReadsRows, nn.Embedding):  # type: ignore[override]  # its weight cannot be set
    """An embedding whose weight is a table of quantized rows; :func:`table_layer` makes it from a dense one.

    Rows have the dtype that those of the dense weight had.
    """

    @property
    def _dense_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows [..., K] for ids [...]."""
        return _read(self.rows, input, self.embedding_dim, self.kind, self.weight_dtype)

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return f"{super().extra_repr()}, kind={self.kind!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of a subclass of nn.Embedding is made when it is needed, and has no name to be pickled by.
        kind = nn.Embedding if type(self) is QuantizedEmbedding else type(self).__bases__[0]
        return _new_embedding, (kind,), self.__getstate__()  # type: ignore[no-untyped-call]


def _read(rows: Tensor, ids: Tensor, columns: int, kind: str, dtype: torch.dtype) -> Tensor:
    if ids.dtype not in (torch.int32, torch.int64):
        raise KernelInputError(
            f"ids of dtype {ids.dtype}", "int32 or int64", "pass ids of rows, as to nn.Embedding"
        )
    # TorchScript has no view as another dtype.
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise ConversionError(
            "torch.jit.trace of an embedding that is a quantized table",
            "torch.compile and torch.export",
            'call torch.export.export(model, inputs), or convert with embedding="dense"',
        )
    return read_rows(rows, ids, columns, ROW_FORMATS[kind], dtype)


# As in DoubleBinaryLinear.
torch.fx.wrap("_read")
torch.fx.wrap("dense_dtype")

TableLayer = QuantizedLinear | QuantizedEmbedding


@cache
def _embedding_class(kind: Any) -> type[QuantizedEmbedding]:
    """Return the class that reads a table in place of a class of embeddings.

    In the order of its bases it follows a subclass, whose own ``forward`` then calls it by ``super().forward(...)``.
    """
    if kind is nn.Embedding:
        return QuantizedEmbedding
    return type(f"Quantized{kind.__name__}", (kind, QuantizedEmbedding), {"__doc__": kind.__doc__})


def _new_embedding(kind: Any) -> QuantizedEmbedding:
    cls = _embedding_class(kind)
    return cls.__new__(cls)


def table_layer(dense: nn.Module, table: QuantizedRows, weight: Tensor | None = None) -> TableLayer:
    """Return the layer that reads a table in place of a dense one, and is in all else what that is.

    Args:
        dense: an embedding or a linear layer.
        table: its parameter may be that of another layer.
        weight: the empty parameter of that layer; None for a new one.
    """
    if weight is None:
        like: Any = dense.weight
        weight = torch.empty(len(table.rows), 0, dtype=like.dtype, device=like.device)
    if not isinstance(dense, nn.Embedding):
        return QuantizedLinear(weight, table, dense_bias(dense))
    new = _new_embedding(type(dense))
    state = dict(vars(dense))
    for store in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        state[store] = state[store].copy()
    del state["_parameters"][WEIGHT_PLACEHOLDER]
    vars(new).update(state)
    wrapped: Any
    for wrapped in new._load_state_dict_pre_hooks.values():
        if getattr(wrapped, "with_module", False):
            wrapped.module = weakref.ref(new)
    new.set_rows_(weight, table)
    return new


def quantize_tables(model: nn.Module, kinds: Mapping[str, str]) -> dict[str, QuantizedRows]:
    """Return the tables of layers; those that share their weight and are of one kind share the table.

    Args:
        model: has the layers, dense.
        kinds: names of layers to names of formats.

    Raises:
        WeightError: a weight is not finite.
    """
    tables: dict[str, QuantizedRows] = {}
    by_weight: dict[tuple[int, str], QuantizedRows] = {}
    for name, kind in kinds.items():
        layer = model.get_submodule(name)
        key = (id(layer._parameters["weight"]), kind)
        if key not in by_weight:
            weight = _weight_of(layer)
            if not bool(torch.isfinite(weight).all()):
                raise WeightError(
                    f"{name!r}: a weight with NaN or infinite entries",
                    "finite weights",
                    "check the model, or leave the layer dense: name it in skip=[...]",
                )
            by_weight[key] = QuantizedRows.of(weight, kind)
        tables[name] = by_weight[key]
    return tables


def swap_tables_(model: nn.Module, tables: Mapping[str, QuantizedRows]) -> nn.Module:
    """Replace dense embeddings and linear layers of ``model`` by such as read tables, in place; return the model."""
    first: dict[int, TableLayer] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, table in tables.items():
        dense = model.get_submodule(name)
        owner = first.get(id(table))
        new = table_layer(dense, table) if owner is None else table_layer(dense, owner.table, owner._empty)
        first.setdefault(id(table), new)
        replacements[dense] = new
    replace_all(model, replacements)
    for note in on_swap if tables else ():
        note(model)
    return model


def table_layers(model: nn.Module) -> dict[str, TableLayer]:
    """Return the layers of a model that read tables, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
    }


def _weight_of(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight if isinstance(layer, nn.Embedding) else dense_weight(layer)
    return weight.detach()  # type: ignore[no-any-return]


def _constant(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
