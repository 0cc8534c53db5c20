"""DoubleBinaryLinear, the factored layer, and the swap of dense layers for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dbf_compile.errors import ConversionError
from dbf_compile.factors import FIRST_STAGE, SIGN_NAMES, TENSOR_NAMES, DoubleBinaryFactors, move_factors
from dbf_compile.ops import double_binary_linear
from dbf_compile.signs import deinterleave, interleave, interleaved_on

# Name of an empty tensor that a layer may have in place of the dense weight that other libraries look for.
WEIGHT_PLACEHOLDER = "weight"


class DoubleBinaryLinear(nn.Module):
    """A linear layer stored as double binary factors.

    ``y = scale_out ⊙ (signs_out · (scale_mid ⊙ (signs_in · (scale_in ⊙ x)))) + bias``, x [..., K], y [..., N]

    The five tensors are buffers: they move with the module and are in its ``state_dict``, but are not trained. Gradients
    with respect to x and bias are exact. On CPUs and CUDA devices the words of the signs are interleaved, as kernels read
    them; ``state_dict`` and ``factors`` have them row by row.

    Args:
        factors: the factored weight.
        bias: floating point [N], or None.
    """

    signs_in: Tensor
    signs_out: Tensor
    scale_in: Tensor
    scale_mid: Tensor
    scale_out: Tensor
    _shares_with: tuple[
        DoubleBinaryLinear, ...
    ] = ()  # the owner of the first stage; the tuple keeps it from being a child

    def __init__(self, factors: DoubleBinaryFactors, bias: Tensor | None = None) -> None:
        super().__init__()
        self.interleaved = interleaved_on(factors.scale_in.device)
        for name, tensor in factors.tensors().items():
            signs = self.interleaved and name in SIGN_NAMES
            self.register_buffer(name, _once(interleave, tensor) if signs else tensor)
        self.bias: nn.Parameter | None
        if bias is None:
            self.register_parameter("bias", None)
        elif isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)

    def share_first_stage_(self, owner: DoubleBinaryLinear) -> None:
        """Share the first stage of ``owner``, in place; it is then in the ``state_dict`` of the owner alone.

        ``load_state_dict(assign=True)`` of a model with both layers shares the owner's new tensors again, if the owner
        comes first in the model and both layers have one device and dtype.
        """
        for name in FIRST_STAGE:
            self.register_buffer(name, getattr(owner, name), persistent=False)
        if self.interleaved != owner.interleaved:
            self.signs_out = _once(interleave if owner.interleaved else deinterleave, self.signs_out)
            self.interleaved = owner.interleaved
        self._shares_with = (owner,)

    @property
    def in_features(self) -> int:
        """K, the size of the input."""
        return self.scale_in.shape[0]

    @property
    def mid_features(self) -> int:
        """R, the size of the middle dimension."""
        return self.scale_mid.shape[0]

    @property
    def out_features(self) -> int:
        """N, the size of the output."""
        return self.scale_out.shape[0]

    @property
    def factors(self) -> DoubleBinaryFactors:
        """The five tensors, checked; signs row by row."""
        tensors = {name: getattr(self, name) for name in TENSOR_NAMES}
        if self.interleaved:
            tensors |= {name: deinterleave(tensors[name]) for name in SIGN_NAMES}
        return DoubleBinaryFactors(**tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., N] for x [..., K], in the dtype that a dense layer would return."""
        device, dtype = x.device.type, x.dtype
        # Autocast has no meta device and ignores float64. Before torch 2.12, Dynamo does not trace torch.amp's own query.
        if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return double_binary_linear(
            x,
            self.signs_in,
            self.signs_out,
            self.scale_in,
            self.scale_mid,
            self.scale_out,
            self.bias,
            dtype,
            self.interleaved,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoubleBinaryLinear:
        # A model passes the same function to all its layers; so shared tensors stay shared.
        super()._apply(lambda tensor: _once(fn, tensor), recurse)  # type: ignore[no-untyped-call]
        self._follow_device()
        return self

    def _follow_device(self) -> None:
        """Reorder the words of the signs as their device needs them."""
        interleaved = interleaved_on(self.scale_in.device)
        if interleaved != self.interleaved:
            for name in SIGN_NAMES:
                setattr(self, name, _once(interleave if interleaved else deinterleave, getattr(self, name)))
            self.interleaved = interleaved

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.interleaved:
            keys = [prefix + name for name in SIGN_NAMES if prefix + name in destination]
            destination |= {key: deinterleave(destination[key]) for key in keys}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # state_dict is a copy of the user's dictionary.
        for key in (prefix + name for name in SIGN_NAMES):
            if self.interleaved and key in state_dict and state_dict[key].dim() == 2:
                state_dict[key] = interleave(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # assign=True replaces tensors, maybe by tensors on another device.
        for owner in self._shares_with:
            theirs, own = owner.scale_in, self.scale_out
            if (theirs.device, theirs.dtype) == (own.device, own.dtype):
                self.share_first_stage_(owner)
        self._follow_device()

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return (
            f"in_features={self.in_features}, mid_features={self.mid_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


# Tensor -> (its version, the last function applied to it, the result).
_applied: MutableMapping[Tensor, tuple[int, weakref.ref[Callable[[Tensor], Tensor]], Tensor]]
_applied = WeakTensorKeyDictionary()


def _once(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return ``function(tensor)``; the same call returns the same object, so that layers go on sharing a first stage."""
    version = 0 if tensor.is_inference() else tensor._version
    last = _applied.get(tensor)
    if last is not None and last[0] == version and last[1]() is function:
        return last[2]
    result = function(tensor)
    if result is not tensor:  # an entry must not keep its own key alive
        _applied[tensor] = (version, weakref.ref(function), result)
    return result


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is the Conv1D of GPT-2: a linear layer whose weight is [K, N]."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def dense_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense linear layers of ``model`` by name, in order: ``nn.Linear`` and Conv1D of GPT-2.

    Subclasses of ``nn.Linear``, parametrized layers among them, may compute something else and are left out. A layer with
    several names is listed once, under the first.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or is_conv1d(module)
    }


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a dense linear layer as [N, K]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(module) else weight


def swap_(model: nn.Module, factors: Mapping[str, DoubleBinaryFactors]) -> nn.Module:
    """Replace dense linear layers of ``model`` by factored ones, in place.

    Args:
        model: any module; its ``nn.Linear`` and Conv1D layers are addressed by their qualified names.
        factors: layer name to factors.

    Returns:
        ``model`` itself, or the new layer if ``model`` is the linear layer named "".

    Raises:
        ConversionError: a name is no dense linear layer of the model, or its factors have other sizes.
            Nothing is replaced then.
    """
    layers = dense_linears(model)
    for name, layer_factors in factors.items():
        if name not in layers:
            raise ConversionError(
                f"factors for {name!r}, which is no dense linear layer of {type(model).__name__}",
                f"{', '.join(sorted(layers)) or 'none: the model has no dense linear layer'}",
                "check that the checkpoint belongs to this model",
            )
        expected = tuple(dense_weight(layers[name]).shape)
        if (layer_factors.out_features, layer_factors.in_features) != expected:
            raise ConversionError(
                f"factors of shape {(layer_factors.out_features, layer_factors.in_features)} for {name!r}",
                f"{expected}, the shape of its weight",
                "check that the checkpoint belongs to this model",
            )
    moved = move_factors(factors, {name: dense_weight(layers[name]).device for name in factors})
    for name, layer_factors in moved.items():
        dense = layers[name]
        bias = dense.bias
        factored = DoubleBinaryLinear(layer_factors, bias if isinstance(bias, Tensor) else None)
        factored.train(dense.training)
        if name == "":
            return factored
        replace_everywhere(model, dense, factored)
    return model


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` by ``new`` under all its parents, in place; a shared layer has several."""
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if child is old:
                setattr(parent, child_name, new)
