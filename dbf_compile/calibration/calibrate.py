"""Calibration: what flows through each linear layer while a model reads sample batches.

    input_second_moment        E[x²] [K],         or E[x xᵀ] [K, K]       over all positions of all batches
    output_grad_second_moment  E[(∂loss/∂y)²] [N], or E[δ δᵀ] [N, N]      the same, with a loss; δ = ∂loss/∂y

Source: importances of Boža and Macko (arXiv 2505.11076), as in the authors' notebooks; they sum the means of
single sequences, here every position counts alike. Clipping of tokens as in NanoQuant.

Positions that a batch's ``attention_mask`` marks as padding do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.batches import random_batches
from dbf_compile.calibration.losses import Loss, loss_named
from dbf_compile.calibration.model_io import attention_mask, call_model, to_device
from dbf_compile.calibration.moments import Moment
from dbf_compile.calibration.offload import _Run, blocks_of, offloaded, without_kv_cache
from dbf_compile.errors import ConversionError, DBFError, OptionError
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.linear import dense_linears
from dbf_compile.options import DENSE_BY_DEFAULT

FORMS = ("diagonal", "input", "kronecker")

_log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    loss: Loss | str | None = "auto",
    form: str = "diagonal",
    layers: Sequence[str] = ("*",),
    clip: float | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, Importance]:
    """Measure the importance of every dense linear layer that the batches reach.

    The model runs in evaluation mode and is left as it was: modes, hooks, gradients and parameters. Gradients
    flow through frozen models too, and none is kept. Equal arguments give equal results.

    Args:
        model: any module; its ``nn.Linear`` and Conv1D layers are measured.
        batches: tensors, sequences or mappings, called as ``model(t)``, ``model(*t)``, ``model(**t)``; see
            :func:`~dbf_compile.calibration.batches.token_batches`. None for the data-free mode: uniformly
            random tokens, for models whose configuration names a ``vocab_size``.
        loss: a name of :mod:`~dbf_compile.calibration.losses`, or a function of (output of the model, batch) to
            a scalar; None to measure inputs only, which needs no backward pass.
        form: "diagonal" for a vector per side; "input" for whole E[x xᵀ]; "kronecker" for whole matrices on both
            sides. From n positions, what lies off the diagonal of a matrix of d features is taken n / (n + d)
            times, as few positions exaggerate how features go together. A whole matrix takes K² (N²) numbers of 8
            bytes while it is measured: name few ``layers`` at a time where that is too much. Heads, which stay
            dense by default and are wide, have vectors.
        layers: patterns (``fnmatch``) of the names of the layers to measure.
        clip: quantile, such as 0.999, of a batch's token norms above which tokens are scaled down to it, so that
            no single one rules the statistics; None to take tokens as they are.
        device: where to compute. The model's blocks are moved there one at a time and back, everything else for
            as long as this takes; what a block has computed is computed again in the backward pass instead of
            being kept. None to compute where the model is, as a whole.
        seed: of random tokens and random losses.

    Returns:
        Layer name to importance, float32 on the device of the layer's input. Layers never reached are left out
        and named in a warning. Gradient moments of all layers are divided by one common number, so that layers
        can be compared.

    Raises:
        ConversionError: no batches, a batch of another type, a loss that is no scalar or has no gradient.
        OptionError: an unknown ``loss`` or ``form``, a ``clip`` outside of 0 to 1.
        WeightError: activations or gradients are NaN or overflow; the message names the layer.
    """
    if form not in FORMS:
        raise OptionError(f"form={form!r}", ", ".join(FORMS), "use 'diagonal', the paper's importance")
    if clip is not None and not 0 < clip < 1:
        raise OptionError(f"clip={clip!r}", "a number between 0 and 1", "0.999 is a usual value")
    generator = torch.Generator().manual_seed(seed)
    criterion = loss_named(loss, model, generator) if isinstance(loss, str) else loss
    if batches is None:
        batches = random_batches(model, generator)
    meters = {
        name: _Meter(
            Moment(_is_whole(name, form, ("input", "kronecker")), clip),
            Moment(_is_whole(name, form, ("kronecker",)), clip),
        )
        for name in dense_linears(model)
        if any(fnmatchcase(name, pattern) for pattern in layers)
    }
    # Every output gets this zero added. The gradient with respect to it passes through all outputs, where the
    # hooks read it, and is the only one computed: no parameter and no input accumulates a .grad.
    anchor = None if criterion is None else torch.zeros((), requires_grad=True)
    run = _Run(anchor)
    empty = True
    with (
        without_kv_cache(model),
        _measuring(model, meters, run),
        offloaded(model, list(blocks_of(model, meters).values()), device, run),
        torch.set_grad_enabled(criterion is not None),
    ):
        for batch in batches:
            empty = False
            if device is not None:
                batch = to_device(batch, device)
            run.mask = attention_mask(batch)
            output = call_model(model, batch)
            if criterion is not None and anchor is not None:
                torch.autograd.grad(_scalar(criterion(output, batch)), anchor, allow_unused=True)
    if empty:
        raise ConversionError(
            "no batches to calibrate with",
            "one batch or more",
            "pass a list; a generator can be read only once",
        )
    missed = [name for name, meter in meters.items() if not meter.inputs.positions]
    if missed:
        _log.warning(
            "no batch reached these layers; all their features will count alike: %s", ", ".join(missed)
        )
    return _importances({name: meter for name, meter in meters.items() if meter.inputs.positions})


def _is_whole(name: str, form: str, forms: Sequence[str]) -> bool:
    return form in forms and not any(fnmatchcase(name, pattern) for pattern in DENSE_BY_DEFAULT)


@dataclass
class _Meter:
    """What was measured at one layer."""

    inputs: Moment
    output_grads: Moment


def _importances(meters: Mapping[str, _Meter]) -> dict[str, Importance]:
    grads = {name: meter.output_grads.mean() for name, meter in meters.items()}
    peaks = [float(diagonal_of(grad).amax()) for grad in grads.values() if grad is not None]
    # A constant factor has no effect, and with it float32 holds the result.
    common = max((peak for peak in peaks if 0 < peak < float("inf")), default=1.0)
    found = {}
    for name, meter in meters.items():
        grad = grads[name]
        moments = (meter.inputs.mean(), None if grad is None else grad / common)
        try:
            found[name] = Importance(*(moment if moment is None else moment.float() for moment in moments))
        except DBFError as error:
            raise error.inside(name) from error
    return found


@contextmanager
def _measuring(model: nn.Module, meters: Mapping[str, _Meter], run: _Run) -> Iterator[None]:
    """Hook the meters on the layers and switch to evaluation mode; undo both at the end, come what may."""
    modes = {module: module.training for module in model.modules()}
    layers = dense_linears(model)
    handles = [
        layers[name].register_forward_hook(_forward_hook(meter, run), with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _forward_hook(meter: _Meter, run: _Run) -> Callable[..., Tensor | None]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not run.again:
            meter.inputs.add(args[0] if args else next(iter(kwargs.values())), run.mask)
        if run.anchor is None or not torch.is_grad_enabled():
            return None
        anchored = output + run.anchor
        if not run.again:
            anchored.register_hook(partial(meter.output_grads.add, mask=run.mask))
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
            "reduce it with mean() or sum(); do not call it under torch.no_grad() or torch.inference_mode()",
        )
    return loss
