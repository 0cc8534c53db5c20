"""DoubleBinaryLinear, the eager layer, and the swap of dense layers for it."""

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

# Name of an empty tensor that a layer may have where other libraries look for a dense weight.
WEIGHT_PLACEHOLDER = "weight"


class DoubleBinaryLinear(nn.Module):
    """A linear layer kept as double binary factors.

    ``y = scale_out ⊙ (signs_out · (scale_mid ⊙ (signs_in · (scale_in ⊙ x)))) + bias``, x [..., K], y [..., N]

    The five tensors are buffers: they move with the module and lie in its ``state_dict``, but are not trained.
    Gradients with respect to x and bias are exact. On CPUs and CUDA devices the words of the signs lie interleaved, as the kernels
    read them; ``state_dict`` and ``factors`` give them row after row as everywhere else.

    Args:
        factors: the factored weight.
        bias: floating point [N], or None.
    """

    signs_in: Tensor
    signs_out: Tensor
    scale_in: Tensor
    scale_mid: Tensor
    scale_out: Tensor
    _shares_with: tuple[DoubleBinaryLinear, ...] = ()  # whose first stage this is; in a tuple it is no child

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
        """Take the first stage of ``owner``, in place; this layer's ``state_dict`` leaves it to the owner's.

        ``load_state_dict(assign=True)`` of a model that holds both hands the owner's new tensors on, if the owner comes
        first in the model, and both layers are of one device and dtype.
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
        """The five tensors, checked; signs row after row."""
        tensors = {name: getattr(self, name) for name in TENSOR_NAMES}
        if self.interleaved:
            tensors |= {name: deinterleave(tensors[name]) for name in SIGN_NAMES}
        return DoubleBinaryFactors(**tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] for x [..., K], in the dtype a dense layer would give."""
        device, dtype = x.device.type, x.dtype
        # Autocast knows no meta device, and leaves float64 alone. (Dynamo cannot ask torch.amp before torch 2.12.)
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
        # The model passes the same function to all its layers: what they share, they go on sharing.
        super()._apply(lambda tensor: _once(fn, tensor), recurse)  # type: ignore[no-untyped-call]
        self._follow_device()
        return self

    def _follow_device(self) -> None:
        """Put the words of the signs in the order of the device that they are on."""
        wanted = interleaved_on(self.scale_in.device)
        if wanted != self.interleaved:
            for name in SIGN_NAMES:
                setattr(self, name, _once(interleave if wanted else deinterleave, getattr(self, name)))
            self.interleaved = wanted

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.interleaved:
            kept = [prefix + name for name in SIGN_NAMES if prefix + name in destination]
            destination |= {key: deinterleave(destination[key]) for key in kept}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # load_state_dict hands over a copy of the user's dictionary.
        for key in (prefix + name for name in SIGN_NAMES):
            if self.interleaved and key in state_dict and state_dict[key].dim() == 2:
                state_dict[key] = interleave(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True tensors are other ones than before, maybe on another device.
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


# Tensor -> its version, the last function that was applied to it, and the result.
_applied: MutableMapping[Tensor, tuple[int, weakref.ref[Callable[[Tensor], Tensor]], Tensor]]
_applied = WeakTensorKeyDictionary()


def _once(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return ``function(tensor)``, the same object when asked again: layers that share a first stage go on sharing it."""
    version = 0 if tensor.is_inference() else tensor._version
    known = _applied.get(tensor)
    if known is not None and known[0] == version and known[1]() is function:
        return known[2]
    result = function(tensor)
    if result is not tensor:  # else the entry would keep its own key alive
        _applied[tensor] = (version, weakref.ref(function), result)
    return result


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is the Conv1D of GPT-2: a linear layer whose weight is [K, N]."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def dense_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of ``model`` by name, in order: ``nn.Linear`` itself and Conv1D of GPT-2.

    Subclasses of ``nn.Linear`` are left out, since they may compute something else; so are parametrized layers.
    A layer that is reachable under several names is listed once, under the first.
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
    for name, made in factors.items():
        if name not in layers:
            raise ConversionError(
                f"factors for {name!r}, which is no dense linear layer of {type(model).__name__}",
                f"{', '.join(sorted(layers)) or 'none: the model has no dense linear layer'}",
                "check that the checkpoint belongs to this model",
            )
        expected = tuple(dense_weight(layers[name]).shape)
        if (made.out_features, made.in_features) != expected:
            raise ConversionError(
                f"factors of shape {(made.out_features, made.in_features)} for {name!r}",
                f"{expected}, the shape of its weight",
                "check that the checkpoint belongs to this model",
            )
    moved = move_factors(factors, {name: dense_weight(layers[name]).device for name in factors})
    for name, made in moved.items():
        dense = layers[name]
        bias = dense.bias
        factored = DoubleBinaryLinear(made, bias if isinstance(bias, Tensor) else None)
        factored.train(dense.training)
        if name == "":
            return factored
        replace_everywhere(model, dense, factored)
    return model


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, in place: a shared layer hangs under several parents, which all must see it."""
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if child is old:
                setattr(parent, child_name, new)
