"""DoubleBinaryLinear, the factored layer, and the swap of dense layers for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from dbf_compile.candidates.dense import dense_bias as dense_bias
from dbf_compile.candidates.dense import dense_linears as dense_linears
from dbf_compile.candidates.dense import dense_weight as dense_weight
from dbf_compile.candidates.dense import is_conv1d as is_conv1d
from dbf_compile.candidates.reasons import reasons_against
from dbf_compile.errors import ConversionError
from dbf_compile.factors import FIRST_STAGE, SIGN_NAMES, TENSOR_NAMES, DoubleBinaryFactors, move_factors
from dbf_compile.ops import double_binary_linear
from dbf_compile.signs import deinterleave, interleave
from dbf_compile.stand_in import FactoredStandIn, StandIn

# Name of the dense weight. Files of transformers have an empty tensor [N, 0] of this name for a factored layer.
WEIGHT_PLACEHOLDER = "weight"
# Called with a model after layers of it were replaced: what other libraries note about models is to stay true.
on_swap: list[Callable[[nn.Module], object]] = []


def dense_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of what a dense linear layer returns for x: its own, or that of autocast."""
    device = x.device.type
    # Autocast has no meta device and ignores float64. Before torch 2.12, Dynamo does not trace torch.amp's own query.
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


# torch.fx.symbolic_trace looks into no layer of torch.nn, and cannot look into these.
torch.fx.wrap("dense_dtype")
torch.fx.wrap("double_binary_linear")


class DoubleBinaryLinear(FactoredStandIn):
    """A linear layer stored as double binary factors.

    ``y = scale_out ⊙ (signs_out · (scale_mid ⊙ (signs_in · (scale_in ⊙ x)))) + bias``, x [..., K], y [..., N]

    The five tensors are parameters without gradients: they are moved, saved, offloaded and sharded as the dense weight was,
    and are not trained. Gradients with respect to x and bias are exact. The words of the signs are interleaved, as kernels
    read them, on every device and in ``state_dict``; ``factors`` has them row by row. Layers that share a first stage hold
    the same three parameters, as tied weights do.

    Args:
        factors: the factored weight.
        bias: floating point [N], or None.
    """

    signs_in: nn.Parameter
    signs_out: nn.Parameter
    scale_mid: nn.Parameter

    def __init__(self, factors: DoubleBinaryFactors, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None:
            self.weight_dtype = bias.dtype
        self.bias: nn.Parameter | None
        if bias is None:
            self.register_parameter("bias", None)
        elif isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        tensors = factors.tensors()
        # Signs come last: others take the dtype of a module to be that of its first parameter.
        for name in sorted(TENSOR_NAMES, key=SIGN_NAMES.__contains__):
            tensor = interleave(tensors[name]) if name in SIGN_NAMES else tensors[name]
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def share_first_stage_(self, owner: DoubleBinaryLinear) -> None:
        """Hold the first stage of ``owner`` in place of one's own."""
        for name in FIRST_STAGE:
            self.register_parameter(name, getattr(owner, name))

    @property
    def mid_features(self) -> int:
        """R, the size of the middle dimension."""
        return self.scale_mid.shape[0]

    @property
    def factors(self) -> DoubleBinaryFactors:
        """The five tensors, checked; signs row by row."""
        tensors = {name: getattr(self, name).detach() for name in TENSOR_NAMES}
        return DoubleBinaryFactors(**tensors | {name: deinterleave(tensors[name]) for name in SIGN_NAMES})

    def forward(self, input: Tensor) -> Tensor:
        """Return the output [..., N] for an input [..., K], in the dtype that a dense layer would return."""
        dtype = dense_dtype(input)  # first, so that the input comes first in a compiled graph, too
        return double_binary_linear(
            input,
            self.signs_in,
            self.signs_out,
            self.scale_in,
            self.scale_mid,
            self.scale_out,
            self.bias,
            dtype,
            interleaved=True,
        )

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return (
            f"in_features={self.in_features}, mid_features={self.mid_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


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
    reasons = reasons_against(model)
    for name, layer_factors in factors.items():
        if name in reasons:
            raise ConversionError(
                f"factors for {name!r}, a layer {reasons[name]}",
                "factors for layers that are called, and are no more than their weights",
                f"leave it dense: take {name!r} out of the factors",
            )
        if name not in layers:
            nearest = get_close_matches(name, layers, n=5, cutoff=0)
            raise ConversionError(
                f"factors for {name!r}, which is no dense linear layer of {type(model).__name__}",
                f"{', '.join(sorted(nearest)) or 'none: the model has no dense linear layer'}",
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
    owners: dict[int, DoubleBinaryLinear] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer_factors in moved.items():
        dense = layers[name]
        factored = DoubleBinaryLinear(layer_factors, dense_bias(dense))
        owner = owners.setdefault(id(layer_factors.signs_in), factored)
        if owner is not factored:
            factored.share_first_stage_(owner)
        if name == "":
            factored.take_place_of_(dense)
            return factored
        replacements[dense] = factored
    replace_all(model, replacements)
    for note in on_swap:
        note(model)
    return model


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` by ``new`` under all its parents, in place; a shared layer has several."""
    replace_all(model, {old: new})


def replace_all(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules by others under all their parents, in place and in one walk: mixtures have thousands of layers."""
    for old, new in replacements.items():
        if isinstance(new, StandIn):
            new.take_place_of_(old)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, child_name, replacements[child])
