"""Distillation of scales: nearer to the dense model, signs untouched, models left as they were."""

import copy

import pytest
import torch
from support.models.tiny import factored, tiny_llama

from dbf_compile.calibration.compare import divergence
from dbf_compile.calibration.model_io import output_mask
from dbf_compile.compression.distillation import DistillRecipe, distill
from dbf_compile.linear import DoubleBinaryLinear, swap_

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def distilled():
    dense = tiny_llama().requires_grad_(False)
    student = factored(dense, bits_per_weight=3.0, iterations=20).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(1, 256, (1, 24), generator=generator)} for _ in range(16)]
    before = copy.deepcopy(student.state_dict())
    steps = []
    recipe = DistillRecipe(4)
    factors, epochs = distill(dense, student, batches[:8], batches[8:], recipe, lambda: steps.append(1))
    assert 1 <= epochs <= 4
    return dense, student, batches, before, factors, steps


def apart(dense, student, batches):
    with torch.no_grad():
        return sum(
            float(divergence(dense(**b).logits, student(**b).logits, output_mask(dense, b)).mean())
            for b in batches
        )


def test_scales_come_nearer_to_the_dense_model_on_other_data_too(distilled):
    dense, student, batches, _, factors, steps = distilled
    better = swap_(copy.deepcopy(dense), factors)
    assert apart(dense, better, batches[:8]) < 0.8 * apart(dense, student, batches[:8])
    assert apart(dense, better, batches[8:]) < apart(dense, student, batches[8:])
    assert len(steps) == 4 * 8


def test_signs_stay_and_the_student_is_left_as_it_was(distilled):
    _, student, _, before, factors, _ = distilled
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert not any(parameter.grad is not None for parameter in student.parameters())
    for name, layer in student.named_modules():
        if isinstance(layer, DoubleBinaryLinear):
            old, new = layer.factors.dense(), factors[name].dense()
            assert ((old < 0) != (new < 0)).float().mean() < 0.2  # entries near zero only
            assert factors[name].scale_in.dtype == torch.float16


def test_what_loses_on_batches_held_out_is_not_kept(distilled):
    dense, student, batches, _, _, _ = distilled
    learned = [{"input_ids": torch.full((1, 24), 7)} for _ in range(4)]
    factors, _ = distill(dense, student, learned, batches[8:], DistillRecipe(8))
    best = swap_(copy.deepcopy(dense), factors)
    assert apart(dense, best, batches[8:]) <= apart(dense, student, batches[8:]) * 1.001
