"""Distillation: the scales of a compressed model learn from the logits of the dense model.

    min  Σ_t KL( softmax(dense logits_t) ‖ softmax(compressed logits_t) )        over the scales; the signs are fixed

Source: the last stage of NanoQuant. Its replications found that training signs as well over-fits a calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.compare import divergence
from dbf_compile.calibration.model_io import call_model, logits_of
from dbf_compile.compression.training import TrainableScales, train, trained_factors
from dbf_compile.factors import DoubleBinaryFactors, move_factors
from dbf_compile.linear import DoubleBinaryLinear, replace_everywhere

_RATE = 0.01  # learning rate, in units of the root mean square of a scale vector


def distill(
    dense: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Any],
    epochs: int,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
    device: torch.device | None = None,
) -> dict[str, DoubleBinaryFactors]:
    """Return factors whose scales are trained on the dense model's logits; both models are left as they were.

    Args:
        dense: the teacher.
        compressed: the student, the same model with factored layers.
        batches: batches to learn from, as for ``calibrate``.
        epochs: how often each batch is used.
        seed: seed of their order.
        progress: called after every step.
        device: where to keep the trained layers; None for where ``compressed`` has them. Elsewhere than there, both
            models must be :func:`~dbf_compile.calibration.offload.offloaded` to it.

    Returns:
        Factors of all factored layers by name, on the CPU.
    """
    layers = {
        name: module for name, module in compressed.named_modules() if isinstance(module, DoubleBinaryLinear)
    }
    owners: dict[int, TrainableScales] = {}
    students: dict[str, TrainableScales] = {}
    for name, layer in layers.items():
        student = TrainableScales(layer.factors.to(device), layer.bias, owners.get(id(layer.signs_in)))
        owners.setdefault(id(layer.signs_in), student)
        students[name] = student
    for name, student in students.items():
        replace_everywhere(compressed, layers[name], student)
    modes = [(model, model.training) for model in (dense, compressed)]
    try:
        for model, _ in modes:
            model.eval()
        scales = [scale for student in students.values() for scale in student.scales]

        def loss(sample: int) -> Tensor:
            batch = batches[sample]
            with torch.no_grad():
                target = logits_of(call_model(dense, batch))
            return divergence(target, logits_of(call_model(compressed, batch)), batch).mean()

        generator = torch.Generator().manual_seed(seed)
        train([(scales, _RATE)], loss, len(batches), epochs, generator, progress)
        factors = trained_factors(students)
        return move_factors(factors, dict.fromkeys(factors, torch.device("cpu")))
    finally:
        for name, student in students.items():
            replace_everywhere(compressed, student, layers[name])
        for model, mode in modes:
            model.train(mode)
