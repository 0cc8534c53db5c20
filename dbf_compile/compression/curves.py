"""Error curves of a model's weights, measured by short factorizations, and the allocation of bits that follows.

    curve of a weight     relative error at half the R of equal bits and at that R
    weight of a curve     loss of the weight alone / its relative error · exp(p (z − ½))

z is the depth of the block, 0 … 1, and p the prior on depth. The loss is measured where there are batches (``sensitivity``).
Else it is tr(L W R Wᵀ), what moments tell to second order: they take activations and gradients to be independent. On SmolLM2-135M
that is in proportion within a factor of two for most weights, and a hundred times too much for one that reads massive activations.

``budgets`` solves for the middle dimensions and knows nothing of layers.

Source: measured curves and the prior on depth as in published replications of NanoQuant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Unpack

import torch
from torch import nn

from dbf_compile.compression.budgets import Allocation, ErrorCurve, allocate_bits
from dbf_compile.compression.cache import CachedStore, FactorCache
from dbf_compile.compression.jobs import FactorJob, run_jobs
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.compression.sensitivity import measured_losses
from dbf_compile.factorizer.factorize import FactorizerConfig, weighted_error
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.factorizer.weighted import WeightedWeight, squared_norm
from dbf_compile.keywords import AllocationKeywords
from dbf_compile.options import AllocationConfig, CompressionConfig
from dbf_compile.progress import over
from dbf_compile.records import resolve

_FRACTIONS = (0.5, 1.0)  # of the R of equal bits: where errors are measured
_LEAST = 1e-12  # an error of nothing has no logarithm
# Short, as what counts is how fast errors fall; fewer iterations flatten the curves where errors are small.
_MEASURING = FactorizerConfig(iterations=35, sweeps=0)


def allocate(
    model: nn.Module,
    importance: Mapping[str, Importance] | None = None,
    *,
    batches: Sequence[Any] = (),
    device: torch.device | str | None = None,
    config: CompressionConfig | None = None,
    **options: Unpack[AllocationKeywords],
) -> Allocation:
    """Measure the error curves of a model's weights and allocate the bits to them.

    Args:
        model: any module; its weights are read, not changed.
        importance: layer name to second moments, as ``calibrate`` returns with a loss. Without gradient moments the
            relative errors of all layers' outputs count alike.
        batches: as for ``calibrate``: with them the loss of every weight is measured, on the first few.
        device: where to measure losses; None for where the model is.
        config: an ``AllocationConfig``, or another record of the same fields; ``overrides`` fix the bits of the layers they
            name.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        The allocation, for ``factorize_model(..., allocation=...)`` and ``convert_(..., allocation=...)``.

    Raises:
        OptionError: an unknown or ill-typed option, or as for :func:`~dbf_compile.compression.budgets.allocate_bits`.
        ConversionError: the model has no layer to factor.
    """
    settings = resolve(AllocationConfig, config, options)
    curves = measure_curves(
        model, settings, importance, batches, device=device, depth_prior=settings.depth_prior
    )
    factorizer = LayerFactorizer(settings)
    fixed = {
        job.name: bits
        for job in factorizer.jobs(model)
        if (bits := factorizer.override_for(job.names[0])) is not None  # stacked layers have equal bits
    }
    return allocate_bits(
        curves,
        settings.bits_per_weight,
        multiple=settings.multiple,
        floor=settings.floor,
        ceiling=settings.ceiling,
        fixed=fixed,
    )


def measure_curves(
    model: nn.Module,
    config: CompressionConfig,
    importance: Mapping[str, Importance] | None = None,
    batches: Sequence[Any] = (),
    *,
    device: torch.device | str | None = None,
    depth_prior: float = 0.0,
) -> dict[str, ErrorCurve]:
    """Return the error curve of each weight that ``factorize_model`` would factor.

    Args:
        model: any module; its weights are read, not changed.
        config: selects the layers, and the bits around which errors are measured.
        importance, batches, device: as for :func:`allocate`.
        depth_prior: p multiplies the weights of block z of 0 … 1 by exp(p (z − ½)): measured curves undervalue the last
            blocks of some large models.

    Returns:
        Error curves by the name of the weight: the names of its layers joined by " + ".

    Raises:
        ConversionError: the model has no layer to factor.
    """
    jobs = LayerFactorizer(config, importance).jobs(model)
    probes = [
        FactorJob(job.names, job.weights, job.importance, size)
        for job in jobs
        for size in _probed(job.mid_features)
    ]
    store = CachedStore(FactorCache(config.cache_dir), _MEASURING)
    run_jobs(probes, _MEASURING, store, config.progress, what="measuring error curves")
    errors: dict[str, dict[int, float]] = {}
    for probe in over(probes, "reading error curves", "weight", config.progress, delay=1.0):
        error = weighted_error(probe.stacked, store.get(probe), probe.importance)
        errors.setdefault(probe.name, {})[probe.mid_features] = max(error, _LEAST)
    weights = _weights(jobs)
    if batches:
        shares = {job.name: weights[job.name] * errors[job.name][job.mid_features] for job in jobs}
        losses = measured_losses(model, jobs, store.get, batches, shares, device, config.progress)
        weights = {job.name: losses[job.name] / errors[job.name][job.mid_features] for job in jobs}
    depths = _depths(jobs)
    return {
        job.name: ErrorCurve(
            job.in_features,
            job.out_features,
            tuple(sorted(errors[job.name].items())),
            weights[job.name] * math.exp(depth_prior * (depths[job.name] - 0.5)),
        )
        for job in jobs
    }


def _probed(mid_features: int) -> list[int]:
    """Return the middle dimensions at which the error of a weight is measured."""
    return sorted({max(1, round(fraction * mid_features)) for fraction in _FRACTIONS})


def _weights(jobs: Sequence[FactorJob]) -> dict[str, float]:
    """Return the loss of every job at a relative error of 1; jobs without gradient moments get the median."""
    energies = {job.name: _energy(job) for job in jobs}
    measured = [energy for energy in energies.values() if energy is not None]
    default = median(measured) if measured else 1.0
    return {name: default if energy is None else energy for name, energy in energies.items()}


def _depths(jobs: Sequence[FactorJob]) -> dict[str, float]:
    """Return the depth of every job's block, 0 to 1; half where there is none."""
    blocks = {job.name: _block(job.name) for job in jobs}
    last = max((block for block in blocks.values() if block is not None), default=0)
    return {name: 0.5 if block is None or last == 0 else block / last for name, block in blocks.items()}


def _energy(job: FactorJob) -> float | None:
    """Return ``tr(L W R Wᵀ)``, or None without gradient moments."""
    importance = job.importance
    if importance is None or importance.output_grad_second_moment is None:
        return None
    weighted = WeightedWeight.of(job.stacked, importance)
    # WeightedWeight divides the moments by their means.
    means = [
        float(diagonal_of(moment).double().mean())
        for moment in (importance.output_grad_second_moment, importance.input_second_moment)
        if moment is not None
    ]
    energy = squared_norm(weighted.matrix, weighted.row_metric, weighted.column_metric)
    return energy * weighted.unit**2 * math.prod(means)


def _block(name: str) -> int | None:
    """Return the number of the block that a layer lies in: the first number in its name."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None
