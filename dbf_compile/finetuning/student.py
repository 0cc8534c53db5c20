"""The model that learns: the compressed one with dense weights in place of factors.

A dense weight is built once a step, used by all tokens of the step, and its gradient tells the factors what to change. For
many tokens that is cheaper than two products with signs, keeps fewer activations, and leaves a plain module of torch, which
whatever trains on several devices understands. Tables of quantized rows stay as they are; a head that reads one is written
out, and does not learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.linear import DoubleBinaryLinear, replace_all
from dbf_compile.tables import QuantizedLinear

_FAST = ("avx512_bf16", "amx_bf16", "bf16")  # what a processor says that multiplies bfloat16


class WrittenOut(nn.Module):
    """A linear layer with a dense weight that is not its own: y = x Wᵀ + bias, x [..., K], y [..., N].

    Args:
        weight: W, floating point [N, K].
        bias: [N], or None.
        trained: whether the weight is to have a gradient.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trained)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the dtype of x."""
        return nn.functional.linear(x, self.weight, self.bias)


def stacks_of(model: nn.Module) -> list[dict[str, DoubleBinaryLinear]]:
    """Return the factored layers of a model by name; those that share a first stage are one stack."""
    stacks: dict[int, dict[str, DoubleBinaryLinear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, DoubleBinaryLinear):
            stacks.setdefault(id(layer.signs_in), {})[name] = layer
    return list(stacks.values())


def write_out_(model: nn.Module, dtype: torch.dtype) -> dict[str, WrittenOut]:
    """Put dense weights in place of factors and of the head's table, in place; tensors of the model's dtype get the dtype.

    Others keep theirs: angles of rotary embeddings would point elsewhere in 16 bits.

    Args:
        model: the compressed model, of transformers. Its factors are kept by who called.
        dtype: of the training, floating point.

    Returns:
        The layers in place of factored ones, by name; their weights have no content yet.
    """
    own: Any = model.dtype
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == own:
            tensor.data = tensor.data.to(dtype)
    model.requires_grad_(False)
    layers: dict[str, WrittenOut] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, DoubleBinaryLinear):
            device = module.scale_out.device
            weight = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device)
            layers[name] = WrittenOut(weight, module.bias, True)
            replacements[module] = layers[name]
        elif isinstance(module, QuantizedLinear):
            replacements[module] = WrittenOut(module.table.dense(dtype), module._parameters["bias"], False)
    replace_all(model, replacements)
    return layers


def small_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the norms and biases of a model by name: its floating-point parameters of one dimension."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point() and parameter.numel()
    }


def training_dtype(model: Any, device: torch.device) -> torch.dtype:
    """Return bfloat16 where the model has it and the device multiplies by it, else float32.

    A model in float16 trains in float32: its gradients would underflow.
    """
    if model.dtype != torch.bfloat16:
        return torch.float32
    fast = device.type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in _FAST)
    return torch.bfloat16 if fast else torch.float32
