"""LoRA adapters of PEFT on top of factored layers.

y = layer(x) + scaling · B · (A · dropout(x))        A [r, K], B [N, r], the only parameters that are trained

Importing this file teaches PEFT the layer: every way to make or load adapters, its own or that of transformers, then knows it.
Three private functions of PEFT, the same in 0.17 to 0.21, are wrapped for that, as it has no registry of layers.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from dbf_compile.errors import ConversionError
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.tables import QuantizedLinear, table_layers

_ALL_LINEAR = "all-linear"
# Of what a LoraConfig can ask for, that which reads or changes the dense weight.
_READS_WEIGHT = ("kasa_config", "velora_config", "monteclora_config", "use_bdlora", "arrow_config")
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
_LEAVE_DENSE = "or leave these layers dense: name them in skip=[...] and convert again"


class LoraDoubleBinaryLinear(Linear):
    """A factored layer with adapters beside it; PEFT puts it in the place of the layer.

    "Linear" in its name is how PEFT knows it as a target of further adapters on "all-linear".
    """

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """Return what computes another kind of adapter than plain LoRA, or None."""
        variant = super().resolve_lora_variant(**kwargs)
        return _Dora() if isinstance(variant, DoraLinearVariant) else variant

    def _get_in_out_features(self, module: nn.Module) -> Any:
        base: Any = module
        return base.in_features, base.out_features

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: an adapter cannot become part of signs."""
        raise _cannot_merge()


LoraDoubleBinary = LoraDoubleBinaryLinear


class _Dora(DoraLinearVariant):
    """DoRA on a factored layer: its dense weight is written out for the norms of its rows, and dropped again."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(_Dense(module), adapter_name, **kwargs)

    @staticmethod
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return DoraLinearVariant.forward(_Dense(module), *args, **kwargs)


class _Dense:
    """A layer with adapters as if the layer below them were dense."""

    def __init__(self, layer: LoraDoubleBinaryLinear) -> None:
        vars(self)["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["layer"], name, value)

    def get_base_layer(self) -> nn.Module:
        base = vars(self)["layer"].get_base_layer()
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        weight = base.table.dense() if isinstance(base, QuantizedLinear) else base.factors.dense()
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = base.bias
        return dense


def add_lora(model: nn.Module, config: LoraConfig | None = None, **kwargs: Any) -> PeftModel:
    """Return a PEFT model with adapters on the factored layers, ready to be trained.

    Args:
        model: compressed, as ``from_pretrained`` loads it or ``convert_`` makes it.
        config: of the adapters; None for rank 8 on all factored layers.
        **kwargs: further arguments of ``peft.get_peft_model``.
    """
    if config is None:
        names = {name for name, layer in model.named_modules() if isinstance(layer, DoubleBinaryLinear)}
        config = LoraConfig(r=8, target_modules=sorted(names))
    wrapped: PeftModel = get_peft_model(model, config, **kwargs)
    return wrapped


def _cannot_merge() -> ConversionError:
    return ConversionError(
        "adapters to be merged into factored layers",
        "adapters beside them; signs cannot hold them",
        "save the adapters and load them again, or call unload() to be without them",
    )


_dispatch = lora_model.dispatch_default
_include_all_linear = tuners_utils._maybe_include_all_linear_layers
_check_merge_allowed = lora_model.LoraModel._check_merge_allowed


def _dispatch_factored(target: Any, adapter_name: str, **kwargs: Any) -> Any:
    """Return the layer with adapters that takes the place of ``target``, or None for one that is not known."""
    base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
    if isinstance(base, (DoubleBinaryLinear, QuantizedLinear)) and kwargs.get("parameter_name") is None:
        return LoraDoubleBinaryLinear(target, adapter_name, **kwargs)
    return _dispatch(target, adapter_name, **kwargs)


def _prepare_targets(config: Any, model: Any) -> Any:
    """Return a configuration of adapters in which "all-linear" means factored layers, too.

    PEFT calls this after it has completed the configuration and before it changes the model.

    Raises:
        ConversionError: adapters that factored layers cannot have.
    """
    asked = getattr(config, "target_modules", None)
    config = _include_all_linear(config, model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoubleBinaryLinear)}
    if isinstance(asked, str) and asked.lower() == _ALL_LINEAR:
        head = _head(config, model)
        config.target_modules |= {
            name for name, layer in layers.items() if layer is not head and not name.endswith(".base_layer")
        }
    names = [name.removesuffix(".base_layer") for name in (*layers, *table_layers(model))]
    _refuse(config, [name for name in names if tuners_utils.check_target_module_exists(config, name)])
    _refuse_training(config, names)
    return config


def _head(config: Any, model: Any) -> nn.Module | None:
    """Return the layer that "all-linear" leaves out, as PEFT does among dense layers."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None and config.task_type == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head


def _refuse(config: Any, targets: list[str]) -> None:
    if not targets:
        return
    if config.peft_type != "LORA":
        raise ConversionError(
            f"adapters of kind {getattr(config.peft_type, 'value', config.peft_type)} on factored layers, such as {targets[0]!r}",
            "LoRA and DoRA",
            f"pass a LoraConfig, {_LEAVE_DENSE}",
        )
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise ConversionError(
            f"init_lora_weights={config.init_lora_weights!r} on factored layers, such as {targets[0]!r}",
            f"{', '.join(map(repr, _INITIALIZATIONS))}; others start from a dense weight and change it",
            f"choose one of these, {_LEAVE_DENSE}",
        )
    for name in _READS_WEIGHT:
        if getattr(config, name, None):
            raise ConversionError(
                f"{name} on factored layers, such as {targets[0]!r}",
                "LoRA and DoRA, which leave the weight as it is",
                f"leave {name} out, {_LEAVE_DENSE}",
            )


def _refuse_training(config: Any, names: list[str]) -> None:
    """Refuse to make a trained copy of a module that holds factored layers."""
    for kept in getattr(config, "modules_to_save", None) or ():
        for name in names:
            if f".{kept}." in f".{name}.":
                raise ConversionError(
                    f"modules_to_save={kept!r}, which holds the factored layer or table {name!r}",
                    "dense modules; signs and quantized rows are not trained",
                    f"put an adapter on it: name it in target_modules, {_LEAVE_DENSE}",
                )


def _check_merge(self: Any) -> None:
    _check_merge_allowed(self)
    if any(isinstance(module, LoraDoubleBinaryLinear) for module in self.model.modules()):
        raise _cannot_merge()


lora_model.dispatch_default = _dispatch_factored
tuners_utils._maybe_include_all_linear_layers = _prepare_targets
lora_model.LoraModel._check_merge_allowed = _check_merge
