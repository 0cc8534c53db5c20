"""Calibration: what flows through each linear layer while a model reads sample batches.

    input_second_moment[k]        E[x_k²]             over all positions of all batches
    output_grad_second_moment[n]  E[(∂loss/∂y_n)²]    the same, with a loss

Source: importances of Boža and Macko (arXiv 2505.11076), as in the authors' notebooks; they sum the means of
single sequences, here every position counts alike. Positions of padding count as well: feed batches without
padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.compression.importance import Importance
from dbf_compile.errors import ConversionError, DBFError
from dbf_compile.linear import dense_linears

Loss = Callable[[Any, Any], Tensor]


def output_loss(output: Any, batch: Any) -> Tensor:
    """Return ``output.loss``, which models of transformers compute themselves when given labels."""
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConversionError(
            f"a model output of type {type(output).__name__} without a loss",
            "an output whose .loss is a tensor",
            "put labels into the batches, or pass loss=lambda output, batch: ...",
        )
    return loss


def calibrate(model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None) -> dict[str, Importance]:
    """Measure the importance of every dense linear layer that the batches reach.

    The model runs in evaluation mode and is left as it was: modes, hooks, gradients and parameters. Gradients
    flow through frozen models too, and none is kept.

    Args:
        model: any module; its ``nn.Linear`` and Conv1D layers are measured.
        batches: tensors, sequences or mappings, called as ``model(t)``, ``model(*t)``, ``model(**t)``.
        loss: (output of the model, batch) to a scalar, such as :func:`output_loss`; None to measure inputs
        only.

    Returns:
        Layer name to importance, float32 on the device of the layer's input; layers never reached are left
        out.

    Raises:
        ConversionError: no batches, a batch of another type, a loss that is no scalar or has no gradient.
        WeightError: activations or gradients overflow; the message names the layer.
    """
    meters = {name: _Meter() for name in dense_linears(model)}
    # Every output gets this zero added. The gradient with respect to it passes through all outputs, where the
    # hooks read it, and is the only one computed: no parameter and no input accumulates a .grad.
    anchor = None if loss is None else torch.zeros((), requires_grad=True)
    empty = True
    with _measuring(model, meters, anchor), torch.set_grad_enabled(loss is not None):
        for batch in batches:
            empty = False
            output = _call(model, batch)
            if loss is not None and anchor is not None:
                torch.autograd.grad(_scalar(loss(output, batch)), anchor, allow_unused=True)
    if empty:
        raise ConversionError(
            "no batches to calibrate with",
            "one batch or more",
            "pass a list; a generator can be read only once",
        )
    return {name: meter.importance(name) for name, meter in meters.items() if meter.inputs.positions}


@dataclass
class _Moment:
    """A running second moment per feature: the sum of squares in float64, and how many were summed."""

    total: Tensor | None = None
    positions: int = 0

    def add(self, values: Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1])
        # float64 throughout: squares of small float16 gradients vanish in less.
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
        self.total = squares if self.total is None else self.total + squares.to(self.total.device)
        self.positions += rows.shape[0]

    def mean(self) -> Tensor | None:
        return None if self.total is None else self.total / self.positions


class _Meter:
    """What was measured at one layer."""

    def __init__(self) -> None:
        self.inputs, self.output_grads = _Moment(), _Moment()

    def importance(self, name: str) -> Importance:
        grads = self.output_grads.mean()
        if grads is not None and bool(grads.any()):
            grads = grads / grads.amax()  # a constant factor has no effect, and float32 holds the result
        inputs = self.inputs.mean()
        try:
            return Importance(*(moment if moment is None else moment.float() for moment in (inputs, grads)))
        except DBFError as error:
            raise error.inside(name) from error


@contextmanager
def _measuring(model: nn.Module, meters: Mapping[str, _Meter], anchor: Tensor | None) -> Iterator[None]:
    """Hook the meters on the layers and switch to evaluation mode; undo both at the end, come what may."""
    modes = {module: module.training for module in model.modules()}
    layers = dense_linears(model)
    handles = [
        layers[name].register_forward_hook(_forward_hook(meter, anchor), with_kwargs=True)
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


def _forward_hook(meter: _Meter, anchor: Tensor | None) -> Callable[..., Tensor | None]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        meter.inputs.add(args[0] if args else next(iter(kwargs.values())))
        if anchor is None or not torch.is_grad_enabled():
            return None
        anchored = output + anchor
        anchored.register_hook(meter.output_grads.add)
        return anchored

    return hook


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise ConversionError(
        f"a batch of type {type(batch).__name__}",
        "a tensor, a sequence or a mapping",
        "wrap it in one of these",
    )


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
