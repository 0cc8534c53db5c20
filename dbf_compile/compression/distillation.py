"""Distillation: the scales of a compressed model learn from the logits of the dense model.

    min  Σ_t KL( softmax(dense logits_t) ‖ softmax(compressed logits_t) )        over the scales; the signs are fixed

Source: the last stage of NanoQuant. Its replications found that training signs as well over-fits a calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.compare import divergence
from dbf_compile.calibration.model_io import call_model, computes_narrowly, logits_of, output_mask
from dbf_compile.compression.training import TrainableScales, train, trained_factors
from dbf_compile.factors import DoubleBinaryFactors, move_factors
from dbf_compile.linear import DoubleBinaryLinear, replace_everywhere
from dbf_compile.machine import narrow_products

_RATE = 0.01  # learning rate, in units of the root mean square of a scale vector


@dataclass(frozen=True)
class DistillRecipe:
    """How scales are trained.

    Args:
        epochs: how often each batch is used.
        seed: seed of their order.
        device: where to keep the trained layers; None for where the compressed model has them. Elsewhere than there, both
            models must be :func:`~dbf_compile.calibration.offload.offloaded` to it.
    """

    epochs: int
    seed: int = 0
    device: torch.device | None = None


def distill(
    dense: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    recipe: DistillRecipe,
    progress: Callable[[], object] = lambda: None,
) -> tuple[dict[str, DoubleBinaryFactors], int]:
    """Return factors whose scales are trained on the dense model's logits; both models are left as they were.

    Args:
        dense: the teacher.
        compressed: the student, the same model with factored layers.
        batches: batches to learn from, as for ``calibrate``.
        held_out: batches to judge with: the scales are kept that have the least divergence on them after an epoch, those
            from before, or some between these and the last. Without any: the last.
        recipe: epochs, seed, device.
        progress: called after every step.

    Returns:
        Factors of all factored layers by name, on the CPU, and how many epochs are kept.
    """
    layers = {
        name: module for name, module in compressed.named_modules() if isinstance(module, DoubleBinaryLinear)
    }
    students = _students(layers, recipe.device)
    for name, student in students.items():
        replace_everywhere(compressed, layers[name], student)
    modes = [(model, model.training) for model in (dense, compressed)]
    try:
        for model, _ in modes:
            model.eval()
        scales = [scale for student in students.values() for scale in student.scales]

        narrow = bool(batches) and computes_narrowly(dense, batches[0], recipe.device)

        def lost(batch: Any) -> Tensor:
            with narrow_products(torch.device("cpu")) if narrow else nullcontext():
                return _lost(dense, compressed, batch)

        def judge() -> float:
            return sum(float(lost(batch)) for batch in held_out)

        generator = torch.Generator().manual_seed(recipe.seed)
        kept = train(
            [(scales, _RATE)],
            lambda sample: lost(batches[sample]),
            len(batches),
            recipe.epochs,
            generator,
            progress,
            judge if held_out else None,
        )
        factors = trained_factors(students)
        return move_factors(factors, dict.fromkeys(factors, torch.device("cpu"))), kept
    finally:
        for name, student in students.items():
            replace_everywhere(compressed, student, layers[name])
        for model, mode in modes:
            model.train(mode)


def _lost(dense: nn.Module, compressed: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        target = logits_of(call_model(dense, batch))
    kl = divergence(target, logits_of(call_model(compressed, batch)), output_mask(dense, batch))
    return kl.sum() / max(1, kl.numel())  # a window of padding alone loses nothing


def _students(
    layers: Mapping[str, DoubleBinaryLinear], device: torch.device | None
) -> dict[str, TrainableScales]:
    """Return a trainable layer for every layer; those that share their first stage share its scales."""
    owners: dict[int, TrainableScales] = {}
    students: dict[str, TrainableScales] = {}
    for name, layer in layers.items():
        student = TrainableScales(layer.factors.to(device), layer.bias, owners.get(id(layer.signs_in)))
        owners.setdefault(id(layer.signs_in), student)
        students[name] = student
    return students
