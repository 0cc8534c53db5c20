"""Error curves, measured: what each weight of a model loses by its middle dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Unpack

from torch import nn

from dbf_compile.compression.budgets import Allocation, ErrorCurve, allocate_bits
from dbf_compile.compression.cache import CachedStore, FactorCache
from dbf_compile.compression.jobs import FactorJob, run_jobs
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.factorizer.factorize import FactorizerConfig, weighted_error
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.factorizer.weighted import WeightedWeight, squared_norm
from dbf_compile.keywords import AllocationKeywords
from dbf_compile.options import AllocationConfig, CompressionConfig
from dbf_compile.records import resolve

_FRACTIONS = (0.5, 1.0, 1.75)  # of the uniform R, where errors are measured
_MEASURING = FactorizerConfig(iterations=50, sweeps=0)  # ranks layers as the whole search would


def allocate(
    model: nn.Module,
    importance: Mapping[str, Importance] | None = None,
    *,
    config: CompressionConfig | None = None,
    **options: Unpack[AllocationKeywords],
) -> Allocation:
    """Measure the error curves of a model's weights and allocate the bits to them.

    Args:
        model: any module; its weights are read, not changed.
        importance: layer name to second moments, as made by ``calibrate`` with a loss. Where no gradient moments
            are known, relative errors of the layers' outputs count alike.
        config: an ``AllocationConfig``, or another record of the same fields; ``overrides`` fix the bits of the layers they
            name.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        The allocation, for ``factorize_model(..., allocation=...)`` and ``convert_(..., allocation=...)``.

    Raises:
        OptionError: an unknown or ill-typed option, or as for :func:`~dbf_compile.compression.budgets.allocate_bits`.
        ConversionError: nothing to compress.
    """
    settings = resolve(AllocationConfig, config, options)
    curves = measure_curves(model, settings, importance, depth_prior=settings.depth_prior)
    fixed = {
        job.name: bits
        for job in LayerFactorizer(settings).jobs(model)
        if (bits := settings.override_for(job.names[0])) is not None  # stacked layers have equal bits
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
    probes = [
        FactorJob(job.names, job.weights, job.importance, size)
        for job in jobs
        for size in _probed(job.mid_features)
    ]
    store = CachedStore(FactorCache(config.cache_dir), _MEASURING)
    run_jobs(probes, _MEASURING, store, config.progress)
    errors: dict[str, list[tuple[int, float]]] = {}
    for probe in probes:
        error = weighted_error(probe.stacked, store.get(probe), probe.importance)
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
