"""Error curves, measured: what each weight of a model loses by its middle dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from torch import nn

from dbf_compile.compression.budgets import Allocation, ErrorCurve, allocate_bits
from dbf_compile.compression.cache import FactorCache
from dbf_compile.compression.jobs import FactorJob, run_jobs
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.errors import ConversionError
from dbf_compile.factorizer.factorize import FactorizerConfig, weighted_error
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.factorizer.weighted import WeightedWeight, squared_norm
from dbf_compile.options import CompressionConfig, parse


def allocate(
    model: nn.Module,
    importance: Mapping[str, Importance] | None = None,
    *,
    multiple: int = 32,
    floor: float | None = None,
    ceiling: float | None = None,
    depth_prior: float = 0.0,
    **options: Any,
) -> Allocation:
    """Measure the error curves of a model's weights and allocate the bits to them.

    Args:
        model: any module; its weights are read, not changed.
        importance: layer name to second moments, as made by ``calibrate`` with a loss. Where no gradient moments
            are known, relative errors of the layers' outputs count alike.
        multiple, floor, ceiling: as for :func:`allocate_bits`.
        depth_prior: p multiplies the weights of block z of 0 … 1 by exp(p (z − ½)): measured curves undervalue
            the last blocks of some large models, for which 0.6 was found.
        **options: fields of CompressionConfig; ``overrides`` fix the bits of the layers they name.

    Returns:
        The allocation, for ``factorize_model(..., allocation=...)`` and ``convert_(..., allocation=...)``.

    Raises:
        OptionError: as for :func:`allocate_bits`.
        ConversionError: nothing to compress.
    """
    config = parse(CompressionConfig, options)
    curves = measure_curves(model, config, importance, depth_prior=depth_prior)
    fixed = {
        job.name: bits
        for job in LayerFactorizer(config).jobs(model)
        if (bits := config.override_for(job.names[0])) is not None  # stacked layers have equal bits
    }
    return allocate_bits(
        curves, config.bits_per_weight, multiple=multiple, floor=floor, ceiling=ceiling, fixed=fixed
    )


def measure_curves(
    model: nn.Module,
    config: CompressionConfig,
    importance: Mapping[str, Importance] | None = None,
    *,
    depth_prior: float = 0.0,
) -> dict[str, ErrorCurve]:
    """Return the error curves of what ``factorize_model`` would factor, by the names of its layers joined by " + ".

    Args:
        model: any module.
        config: which layers, and around how many bits.
        importance: as for :func:`allocate`.
        depth_prior: as for :func:`allocate`.

    Raises:
        ConversionError: nothing to compress.
    """
    jobs = LayerFactorizer(config, importance).jobs(model)
    if not jobs:
        raise ConversionError(
            f"{type(model).__name__} without a linear layer to factor",
            "nn.Linear or Conv1D layers that are neither skipped nor too small",
            f"check skip={list(config.skip)} and bits_per_weight={config.bits_per_weight}",
        )
    probes = [
        FactorJob(job.names, job.weights, job.importance, size)
        for job in jobs
        for size in _probed(job.mid_features)
    ]
    made = run_jobs(probes, _MEASURING, FactorCache(config.cache_dir), config.progress)
    errors: dict[str, list[tuple[int, float]]] = {}
    for probe, factors in zip(probes, made, strict=True):
        error = weighted_error(probe.stacked, factors, probe.importance)
        errors.setdefault(probe.name, []).append((probe.mid_features, max(error, 1e-12)))
    weights = _weights(jobs, depth_prior)
    return {
        job.name: ErrorCurve(job.in_features, job.out_features, tuple(errors[job.name]), weights[job.name])
        for job in jobs
    }


def _probed(mid_features: int) -> list[int]:
    return sorted({max(1, round(fraction * mid_features)) for fraction in _FRACTIONS})


def _weights(jobs: Sequence[FactorJob], depth_prior: float) -> dict[str, float]:
    """Return the loss of every job at a relative error of 1."""
    known = {job.name: _energy(job) for job in jobs}
    measured = [value for value in known.values() if value is not None]
    usual = median(measured) if measured else 1.0
    blocks = {name: _block(name) for name in known}
    last = max((block for block in blocks.values() if block is not None), default=0)
    weights = {}
    for name, energy in known.items():
        block = blocks[name]
        depth = 0.5 if block is None or last == 0 else block / last
        weights[name] = (usual if energy is None else energy) * math.exp(depth_prior * (depth - 0.5))
    return weights


def _energy(job: FactorJob) -> float | None:
    """Return ``tr(L W R Wᵀ)``, or None where no gradient says what an output is worth."""
    importance = job.importance
    if importance is None or importance.output_grad_second_moment is None:
        return None
    given = WeightedWeight.of(job.stacked, importance)
    # The moments were divided by their means when the weight was weighted.
    sizes = [
        float(diagonal_of(moment).double().mean())
        for moment in (importance.output_grad_second_moment, importance.input_second_moment)
        if moment is not None
    ]
    energy = squared_norm(given.matrix, given.row_metric, given.column_metric)
    return energy * given.unit**2 * math.prod(sizes)


def _block(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


_FRACTIONS = (0.5, 1.0, 1.75)  # of the uniform R, where errors are measured


_MEASURING = FactorizerConfig(iterations=50, sweeps=0)  # ranks layers as the whole search would
