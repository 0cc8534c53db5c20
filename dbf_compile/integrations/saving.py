"""save_pretrained of models that have factored layers, however these came into the model.

A model that ``convert_`` changed is saved as a compressed folder is, and ``from_pretrained`` loads it. Its configuration says
what is factored as soon as layers have been replaced. Importing this file wraps ``PreTrainedModel.save_pretrained``, which
alone sees a model as it is when it is saved, under the names of its files, and ``resize_token_embeddings``, which would make
new rows of the old ones.
"""

from __future__ import annotations

from functools import wraps
from inspect import signature
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from dbf_compile.errors import ConversionError
from dbf_compile.integrations.renaming import conversions_of_saving, in_files, table_in_files
from dbf_compile.integrations.tables import renamed
from dbf_compile.integrations.transformers import (
    METHOD,
    DBFConfig,
    DBFQuantizer,
    quantization_method,
    quantize_config_,
    record_,
)
from dbf_compile.linear import on_swap
from dbf_compile.tables import QuantizedEmbedding, QuantizedLinear

_save_pretrained = PreTrainedModel.save_pretrained
_resize_token_embeddings = PreTrainedModel.resize_token_embeddings


@wraps(_save_pretrained)
def _save(self: Any, *args: Any, **kwargs: Any) -> Any:
    config = record_(self)
    if config is None:
        if isinstance(getattr(self, "hf_quantizer", None), DBFQuantizer):  # it was loaded, and is dense again
            self.hf_quantizer.remove_quantization_config(self)
        return _save_pretrained(self, *args, **kwargs)
    _refuse_adapters(self, config)
    arguments = signature(_save_pretrained).bind(self, *args, **kwargs).arguments
    quantizer = DBFQuantizer(config)
    # A quantizer gives what is saved; transformers would drop a state that the caller passes.
    quantizer.state = arguments.get("state_dict")
    before = {
        name: vars(self)[name] for name in ("hf_quantizer", "_weight_conversions") if name in vars(self)
    }
    self.hf_quantizer, self._weight_conversions = quantizer, conversions_of_saving(self)
    if arguments.get("save_original_format", True):
        table = table_in_files(self, config.layers)
        tables = renamed(config.tables, in_files(self))
        quantize_config_(self.config, DBFConfig(**{**config.to_dict(), "layers": table, "tables": tables}))
    try:
        return _save_pretrained(self, *args, **kwargs)
    finally:
        del self.hf_quantizer, self._weight_conversions
        vars(self).update(before)
        quantize_config_(self.config, config)


@wraps(_resize_token_embeddings)
def _resize(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    tables = [
        layer for layer in (self.get_input_embeddings(), self.get_output_embeddings()) if _reads_rows(layer)
    ]
    arguments = signature(_resize_token_embeddings).bind(self, new_num_tokens, *args, **kwargs).arguments
    if not tables:
        return _resize_token_embeddings(self, new_num_tokens, *args, **kwargs)
    rows, multiple = len(tables[0].rows), arguments.get("pad_to_multiple_of") or 1
    size = -(-(rows if new_num_tokens is None else new_num_tokens) // multiple) * multiple
    if any(len(table.rows) != size for table in tables):
        raise ConversionError(
            f"a table of {rows} quantized rows to be resized to {size}",
            "dense rows, of which new ones are made",
            "resize the dense model, then compress it; or compress with head='dense' and embedding='dense'",
        )
    return self.get_input_embeddings()


def _reads_rows(layer: object) -> bool:
    return isinstance(layer, (QuantizedLinear, QuantizedEmbedding))


def _refuse_adapters(model: Any, config: DBFConfig) -> None:
    is_adapted = any(name.endswith(".base_layer") for name in (*config.layers, *config.tables))
    if is_adapted and not getattr(
        model, "_hf_peft_config_loaded", False
    ):  # transformers saves its own adapters alone
        raise ConversionError(
            "a model to be saved with adapters around its factored layers",
            "a model without them",
            "save the adapters by the model that PEFT returned; call its unload() for the model as it was",
        )


def _note(model: nn.Module) -> None:
    """Keep the configurations of models of transformers true, of which layers were replaced."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            if quantization_method(module.config) in (None, METHOD):  # saving refuses others
                record_(module)


PreTrainedModel.save_pretrained = _save
PreTrainedModel.resize_token_embeddings = _resize
on_swap.append(_note)
