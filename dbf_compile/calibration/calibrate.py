"""Calibration: second moments of the inputs and output gradients of each linear layer, from sample batches.

    input_second_moment        E[x²] [K],         or E[x xᵀ] [K, K]       over all positions of all batches
    output_grad_second_moment  E[(∂loss/∂y)²] [N], or E[δ δᵀ] [N, N]      the same, with a loss; δ = ∂loss/∂y

Source: importances of Boža and Macko (arXiv 2505.11076). The authors' notebooks sum the means of single sequences; here
every position counts alike. Clipping of tokens as in NanoQuant.

Positions that the ``attention_mask`` of a batch marks as padding do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dbf_compile.calibration.batches import RANDOM_WINDOWS, random_batches
from dbf_compile.calibration.limits import checked
from dbf_compile.calibration.losses import Loss, loss_named
from dbf_compile.calibration.model_io import attention_mask, call_model, to_device
from dbf_compile.calibration.moments import Moment
from dbf_compile.calibration.offload import (
    Recomputation,
    blocks_of,
    in_evaluation,
    offloaded,
    without_kv_cache,
)
from dbf_compile.candidates.reasons import reasons_against
from dbf_compile.errors import ConversionError, DBFError
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.keywords import CalibrationKeywords
from dbf_compile.linear import dense_linears
from dbf_compile.names import check_names, layer_names, plain_name
from dbf_compile.options import USUAL_PATTERNS, CalibrationConfig
from dbf_compile.progress import over
from dbf_compile.records import resolve

_log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    config: CalibrationConfig | None = None,
    **options: Unpack[CalibrationKeywords],
) -> dict[str, Importance]:
    """Measure the importance of every dense linear layer that the batches reach: E[x xᵀ] and E[δ δᵀ], δ = ∂loss/∂y.

    The model runs in evaluation mode and is left as it was: modes, hooks, gradients and parameters. Gradients flow through
    frozen models too; none is kept. Equal arguments give equal results.

    Args:
        model: any module; its ``nn.Linear`` and Conv1D layers are measured.
        batches: tensors, sequences or mappings, called as ``model(t)``, ``model(*t)``, ``model(**t)``; see
            :func:`~dbf_compile.calibration.batches.token_batches`. None for calibration without data: uniformly random
            tokens, for models whose configuration has a ``vocab_size``.
        config: loss, form of the curvature, layers, clipping, device and seed.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        Layer name to importance, float32 on the device of the layer's input. Layers that no batch reached are left out and
        named in a warning. The gradient moments of all layers are divided by one number, so that layers can be compared.

    Raises:
        OptionError: an unknown or ill-typed option, or a pattern in ``layers`` that matches no layer.
        ConversionError: no batches, a batch of another type or one that the model cannot read, a loss that is no scalar or
            has no gradient.
        WeightError: activations or gradients are NaN or overflow; the message names the layer.
    """
    settings = resolve(CalibrationConfig, config, options)
    generator = torch.Generator().manual_seed(settings.seed)
    loss = settings.loss
    criterion = loss_named(loss, model, generator) if isinstance(loss, str) else loss
    total = RANDOM_WINDOWS if batches is None else None
    batches = random_batches(model, generator) if batches is None else checked(model, batches)
    batches = over(batches, "calibrating", "batch", settings.progress, total)
    meters = {
        name: _Meter(
            Moment(_is_whole(name, settings.curvature, ("input", "kronecker")), settings.clip),
            Moment(_is_whole(name, settings.curvature, ("kronecker",)), settings.clip),
        )
        for name in _measured(model, settings.layers)
    }
    _measure(model, batches, meters, criterion, settings.device)
    missed = [name for name, meter in meters.items() if not meter.inputs.positions]
    if missed:
        _log.warning(
            "no batch reached these layers; all their features will count alike: %s", ", ".join(missed)
        )
    return _importances({name: meter for name, meter in meters.items() if meter.inputs.positions})


def _measured(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers to measure: those that can be factored and match a pattern."""
    check_names("layers", set(patterns) - {"*"}, layer_names(model), type(model).__name__)
    against = reasons_against(model)
    return [
        name
        for name in dense_linears(model)
        if name not in against and any(fnmatchcase(plain_name(name), pattern) for pattern in patterns)
    ]


def _measure(
    model: nn.Module,
    batches: Iterable[Any],
    meters: Mapping[str, _Meter],
    criterion: Loss | None,
    device: torch.device | str | None,
) -> None:
    """Run the model on every batch: forward and, with a loss, backward. The meters accumulate moments."""
    # Hooks add this zero to every output. Its gradient passes through all outputs, where the hooks read it. It is the only
    # gradient that is computed: no parameter and no input accumulates a .grad.
    anchor = None if criterion is None else torch.zeros((), requires_grad=True)
    state = _HookState(anchor)
    empty = True
    with (
        without_kv_cache(model),
        in_evaluation(model),
        _measuring(model, meters, state),
        offloaded(model, list(blocks_of(model, meters).values()), device, state.recomputation),
        torch.set_grad_enabled(criterion is not None),
    ):
        for batch in batches:
            empty = False
            if device is not None:
                batch = to_device(batch, device)
            mask = attention_mask(batch)
            state.mask = None if mask is None or bool(mask.all()) else mask
            output = call_model(model, batch)
            if criterion is not None and anchor is not None:
                torch.autograd.grad(_scalar(criterion(output, batch)), anchor, allow_unused=True)
    if empty:
        raise ConversionError(
            "no batches to calibrate with",
            "one batch or more",
            "pass a list; a generator can be read only once",
        )


def _is_whole(name: str, curvature: str, curvatures: Sequence[str]) -> bool:
    """Return whether a layer gets a matrix; heads, wide and dense by default, get vectors."""
    return curvature in curvatures and not any(fnmatchcase(name, pattern) for pattern in USUAL_PATTERNS)


@dataclass
class _Meter:
    """The moments of one layer."""

    inputs: Moment
    output_grads: Moment


@dataclass
class _HookState:
    """What the hooks of all layers need to know: the anchor, the padding of the current batch, and the pass."""

    anchor: Tensor | None
    mask: Tensor | None = None
    recomputation: Recomputation = field(default_factory=Recomputation)


def _importances(meters: Mapping[str, _Meter]) -> dict[str, Importance]:
    grads = {name: meter.output_grads.mean() for name, meter in meters.items()}
    peaks = [float(diagonal_of(grad).amax()) for grad in grads.values() if grad is not None]
    # A common factor has no effect; with it the moments fit float32.
    common = max((peak for peak in peaks if 0 < peak < float("inf")), default=1.0)
    importances = {}
    for name, meter in meters.items():
        grad = grads[name]
        moments = (meter.inputs.mean(), None if grad is None else grad / common)
        try:
            importances[name] = Importance(
                *(moment if moment is None else moment.float() for moment in moments)
            )
        except DBFError as error:
            raise error.inside(name) from error
    return importances


@contextmanager
def _measuring(model: nn.Module, meters: Mapping[str, _Meter], state: _HookState) -> Iterator[None]:
    """Hook the meters on their layers; they are taken off at the end, after errors too."""
    layers = dense_linears(model)
    handles = [
        # Before other hooks: what they make of an output is not the layer's.
        layers[name].register_forward_hook(_forward_hook(meter, state), prepend=True, with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(meter: _Meter, state: _HookState) -> Callable[..., Tensor | None]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        recomputing = state.recomputation.running
        if not recomputing:
            meter.inputs.add(args[0] if args else next(iter(kwargs.values())), state.mask)
        if state.anchor is None or not torch.is_grad_enabled():
            return None
        anchored = output + state.anchor
        if not recomputing:
            anchored.register_hook(partial(meter.output_grads.add, mask=state.mask))
        return anchored

    return hook


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = (
            f"shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}"
            if isinstance(loss, Tensor)
            else f"type {type(loss).__name__}"
        )
        raise ConversionError(
            f"a loss of {got}",
            "a tensor with one entry that depends on the model's linear layers",
            "reduce it with mean() or sum(), outside torch.no_grad() and torch.inference_mode()",
        )
    return loss
