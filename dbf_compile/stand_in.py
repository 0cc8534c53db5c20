"""Stand-ins for dense layers: who looks at ``weight`` is served, who uses its values is told.

Programs look at the weight of a layer to learn its dtype, device or shape: T5 casts to the dtype of ``wo.weight``,
transformers fits a bias to the rows of ``weight``, PEFT puts its adapters where ``weight`` is. A stand-in has no dense
weight. In its place :class:`FactoredWeight` has the dtype, device and shape of the dense one, and refuses all else.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from dbf_compile.errors import CheckpointError, ConversionError

_log = logging.getLogger(__name__)

# What tells nothing of values. Names, so that sources can be read for them, too.
_QUESTIONS = """
shape dtype device ndim itemsize nbytes layout requires_grad grad grad_fn is_leaf is_cpu is_cuda is_meta is_mps is_xpu is_sparse
is_quantized is_nested size dim ndimension numel nelement element_size stride is_contiguous storage_offset get_device
is_floating_point is_complex is_signed is_inference __len__
"""
LOOKS = frozenset(_QUESTIONS.split())
# Functions and methods that make another tensor of that dtype, device or shape.
BUILDS = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
NEW = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"}
# Methods of another tensor that take one only for its dtype, device or shape.
LIKE_ANOTHER = {"to", "type_as", "view_as", "expand_as", "reshape_as"}
# What returns the same tensor, seen in another way.
SAME = {"data", "detach"}


def _of_tensor(names: Iterable[str]) -> frozenset[Any]:
    """Return what ``__torch_function__`` is called with for methods and attributes of tensors."""
    members = (getattr(Tensor, name) for name in names)
    return frozenset(member if callable(member) else member.__get__ for member in members)


_ASKS = _of_tensor(LOOKS) | {torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel}
_BUILDS = _of_tensor(NEW) | {getattr(torch, name) for name in BUILDS}
_LIKE_ANOTHER = _of_tensor(LIKE_ANOTHER)
_SAME = _of_tensor(SAME)
_FREEZE = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
# Beside the dictionaries whose names end in "_hooks".
_KINDS_OF_HOOKS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)
# Parameters to what took their place in one layer, while others hold them still: those that share one go on sharing.
_replaced = WeakTensorKeyDictionary()
# A compiled call is one of the dense layer.
_PLAIN = frozenset({*vars(nn.Linear(1, 1, device="meta")), "weight", "bias", "_compiled_call_impl"})


def _attached(layer: nn.Module) -> frozenset[str]:
    """Return names of what a dense layer has and a new ``nn.Linear`` has not."""
    return frozenset({*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}) - _PLAIN


class FactoredWeight(Tensor):
    """The ``weight`` of a factored layer: dtype, device and shape of the dense weight, and no values.

    Where the layer has a parameter without entries in its place, the attribute ``empty`` is this one.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer questions about dtype, device and shape.

        Raises:
            ConversionError: any other use.
        """
        kwargs = kwargs or {}
        if func in _SAME or (func in _FREEZE and not any((*args[1:], *kwargs.values()))):
            return args[0]
        empty = getattr(args[0], "empty", None) if args else None
        if empty is not None and func is Tensor.data_ptr:
            return id(empty)  # accelerate looks for tied parameters so; all that have no data lie at 0
        if empty is not None and _moves(func, args):
            return func(empty, *args[1:], **kwargs)
        if func in _ASKS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func in _BUILDS or (func in _LIKE_ANOTHER and not isinstance(args[0], FactoredWeight)):
            return func(*map(_without_values, args), **{k: _without_values(v) for k, v in kwargs.items()})
        raise _used(func)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FactoredWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    __format__ = object.__format__


class _WithoutStorage(FactoredWeight):
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse what passes ``__torch_function__`` by.

        Raises:
            ConversionError: always.
        """
        raise _used(func)


def _without_values(value: Any) -> Any:
    """Return a tensor of one number, expanded, in place of a stand-in's weight; anything else as it is."""
    if not isinstance(value, FactoredWeight):
        return value
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _moves(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Return whether somebody moves a parameter to a device."""
    return func is Tensor.to and len(args) == 2 and isinstance(args[1], (torch.device, str, int))


def _used(func: Callable[..., Any]) -> ConversionError:
    return ConversionError(
        f"the weight of a factored layer or a quantized table in {getattr(func, '__name__', func)}",
        "its dtype, device and shape; there are no dense values",
        "call the layer itself, or leave it dense: name it in skip=[...] and convert again",
    )


class WithoutWeight(nn.Module):
    """A module that keeps its weight in another form, and answers for what the dense one looked like.

    Attributes:
        weight_dtype: dtype of the dense weight; it follows ``to``, ``half`` and the like.
    """

    weight_dtype: Any

    @property
    def _dense_shape(self) -> tuple[int, int]:
        """The shape of the dense weight."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        """The device of what stands for the weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """What the dense weight looks like; it has no values."""
        if "weight" in self._buffers:
            return self._buffers["weight"]  # type: ignore[return-value]  # a file is being loaded: see integrations
        kind: dict[str, Any] = {"dtype": self.weight_dtype, "device": self._device}
        if torch.compiler.is_dynamo_compiling():  # of this the graph has no trace where nothing reads it
            return torch.empty(self._dense_shape, **kind).as_subclass(FactoredWeight)
        return Tensor._make_wrapper_subclass(_WithoutStorage, self._dense_shape, **kind)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and name not in self._buffers:
            raise ConversionError(
                "a weight for a factored layer or a quantized table",
                "the tensors that it has",
                "convert again from the dense model, or leave the layer dense: name it in skip=[...]",
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        for name, parameter in self._parameters.items():
            entry = state_dict.get(f"{prefix}{name}")
            if parameter is None or parameter.is_floating_point() or not isinstance(entry, Tensor):
                continue
            if entry.dtype != parameter.dtype:
                raise CheckpointError(
                    f"{prefix}{name} of dtype {entry.dtype} in a state",
                    f"{parameter.dtype}: words of bits, of which there is no mean and no other dtype",
                    "load the words as they were saved; average and cast floating-point tensors alone",
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._parameters)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._parameters[name]
            if old is None or new is None or new is old:
                continue
            shared = _replaced[old]() if old in _replaced else None
            if shared is not None and (shared.dtype, shared.device) == (new.dtype, new.device):
                self._parameters[name] = shared
            else:
                _replaced[old] = TensorWeakRef(new)
        return self

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which compiles the sources of what a dense layer computes.

        Raises:
            ConversionError: always.
        """
        raise ConversionError(
            "torch.jit.script of a model with factored layers or quantized tables",
            "torch.compile, torch.export and torch.jit.trace",
            "call torch.export.export(model, inputs), or script the dense model",
        )


class StandIn(WithoutWeight):
    """A module in the place of a dense linear layer.

    Attributes:
        transposed: the dense weight is stored as [K, N], as in Conv1D of GPT-2.
        carried: names of what the dense layer had besides weight and bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transposed = False
        self.carried: frozenset[str] = frozenset()

    @property
    def in_features(self) -> int:
        """K, the size of the input."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """N, the size of the output."""
        raise NotImplementedError

    @property
    def _dense_shape(self) -> tuple[int, int]:
        shape = (self.out_features, self.in_features)
        return (shape[1], shape[0]) if self.transposed else shape

    def take_place_of_(self, old: nn.Module) -> None:
        """Take over all that a layer is besides its weight and bias: mode, hooks, and what its owner attached to it."""
        weight: Any = old.weight
        self.weight_dtype = weight.dtype
        self.transposed = tuple(weight.shape) != (self.out_features, self.in_features)
        self.training = old.training
        for name, value in vars(old).items():
            if name.endswith("_hooks") or name in _KINDS_OF_HOOKS:
                vars(self)[name] = value  # the same dictionary: handles go on removing hooks
        wrapped: Any
        for wrapped in self._load_state_dict_pre_hooks.values():
            if getattr(wrapped, "with_module", False):
                wrapped.module = weakref.ref(self)
        self.carried = old.carried if isinstance(old, StandIn) else _attached(old)
        for store in ("_parameters", "_buffers", "_modules"):
            vars(self)[store].update({k: v for k, v in vars(old)[store].items() if k in self.carried})
        self._non_persistent_buffers_set |= old._non_persistent_buffers_set & self.carried
        vars(self).update({name: value for name, value in vars(old).items() if name in self.carried})


class FactoredStandIn(StandIn):
    """A stand-in that holds factors: the scales tell its sizes."""

    scale_in: nn.Parameter
    scale_out: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.weight_dtype = torch.get_default_dtype()

    @property
    def in_features(self) -> int:
        """K, the size of the input."""
        return self.scale_in.shape[0]

    @property
    def out_features(self) -> int:
        """N, the size of the output."""
        return self.scale_out.shape[0]

    @property
    def _device(self) -> torch.device:
        return self.scale_out.device

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        dense = state_dict.get(f"{prefix}weight")
        if isinstance(dense, Tensor) and dense.shape == self._dense_shape:
            _log.warning(
                "dbf: the dense weight %s is not loaded into its factored layer: load it before convert_",
                f"{prefix}weight",
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self
