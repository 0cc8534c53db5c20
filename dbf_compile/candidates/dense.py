"""Dense linear layers, told by themselves: what computes ``y = x Wᵀ + b`` from a plain weight, and why others do not."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

_TORCH = inspect.getfile(nn.Linear)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is the Conv1D of GPT-2: a linear layer whose weight is [K, N]."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules that a user would call linear layers, by name, in order; one with several names under the first."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def dense_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense linear layers of ``model`` by name, in order: ``nn.Linear`` and Conv1D of GPT-2.

    Those are left out that may compute something else than their weight says: see :func:`why_not_dense`. A layer with several
    names is listed once, under the first.
    """
    return {name: module for name, module in linears(model).items() if why_not_dense(module) is None}


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a dense linear layer as [N, K]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(module) else weight


def dense_bias(module: nn.Module) -> Tensor | None:
    """Return the bias [N] of a dense linear layer, or None."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def why_not_dense(module: nn.Module) -> str | None:
    """Return why a linear layer may compute something else than its weight says, or None if it does as it says."""
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        if hasattr(module, "parametrizations"):
            return "with a parametrization"
        return f"of the class {type(module).__name__}, which may compute something else"
    if "forward" in vars(module):
        return f"with a forward of {'accelerate' if hasattr(module, '_hf_hook') else 'its own'}"
    if type(module) is nn.Linear and not _is_of_torch(nn.Linear.forward):
        return "with a forward that was patched into nn.Linear"
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is None:
            if name == "weight" or getattr(module, name, None) is not None:
                return f"with a {name} that is computed before every call"
        elif type(parameter) is not nn.Parameter:
            return f"with a {name} of type {type(parameter).__name__}"
    weight = dense_weight(module)
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"with a weight of dtype {str(weight.dtype).removeprefix('torch.')} and shape {tuple(weight.shape)}"
    return None


def _is_of_torch(function: object) -> bool:
    # Not by name: functools.wraps gives a wrapper the name of what it wraps.
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == _TORCH
