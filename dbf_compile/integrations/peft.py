"""LoRA adapters of PEFT on top of factored layers.

y = layer(x) + scaling · B · (A · dropout(x))        A [r, K], B [N, r], the only parameters that are trained
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dbf_compile.linear import DoubleBinaryLinear


class LoraDoubleBinary(nn.Module, LoraLayer):
    """A factored layer with adapters beside it; PEFT puts it in the place of the layer."""

    def __init__(
        self,
        base_layer: DoubleBinaryLinear,
        adapter_name: str,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._active_adapter = adapter_name
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y [..., N] for x [..., K], in the dtype of the layer's own output."""
        adapters: Any = self  # LoraLayer's attributes are not annotated
        y: Tensor = adapters.base_layer(x, *args, **kwargs)
        if adapters.disable_adapters:
            return y
        for name in adapters.active_adapters:
            if name in adapters.lora_A:
                narrow, widen = adapters.lora_A[name], adapters.lora_B[name]
                inner = narrow(adapters.lora_dropout[name](x.to(narrow.weight.dtype)))
                y = y + (adapters.scaling[name] * widen(inner)).to(y.dtype)
        return y

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: an adapter cannot become part of signs."""
        raise NotImplementedError("adapters cannot be merged into factored layers; leave them beside them")


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
    # PEFT's hook for layers it does not know; older releases lack a public one.
    config._register_custom_module({DoubleBinaryLinear: LoraDoubleBinary})
    with warnings.catch_warnings():
        # PEFT does not know the layer, but reads the sizes it needs from its attributes.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        wrapped: PeftModel = get_peft_model(model, config, **kwargs)
    return wrapped
