"""From the dense linear layers of a model to factors, all cores busy.

Layers that read one input (q/k/v, gate/up) are stacked and factored as one weight: they share the first stage,
which costs one product instead of several, and a taller matrix loses less at equal bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dbf_compile.compression.admm import FactorizerConfig, factorize
from dbf_compile.compression.cache import FactorCache, content_key
from dbf_compile.compression.importance import Importance
from dbf_compile.errors import ConversionError, DBFError
from dbf_compile.factors import DoubleBinaryFactors, mid_features_for
from dbf_compile.linear import dense_linears, dense_weight, swap_
from dbf_compile.options import CompressionConfig, parse

# Below this the 16-bit scales take most of the bits and the product approximates nothing.
MIN_MID_FEATURES = 8

# Names of layers of one parent that read the same input, in the architectures of transformers.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@dataclass(frozen=True)
class FactorJob:
    """One weight to factor, or several stacked ones that share their first stage.

    Args:
        names: names of the layers, one per weight.
        weights: the dense weights [N_i, K]; all have the same K.
        importance: of the stacked weight, or None.
        mid_features: R.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    importance: Importance | None
    mid_features: int

    @property
    def stacked(self) -> Tensor:
        """The weight that is factored, [Σ N_i, K]."""
        return self.weights[0].detach() if len(self.weights) == 1 else torch.cat([w.detach() for w in self.weights])


def wants(name: str, out_features: int, in_features: int, config: CompressionConfig) -> bool:
    """Return whether a layer is to be factored: not skipped, and large enough to gain."""
    return (
        not config.skips(name)
        and mid_features_for(config.bits_for(name), in_features, out_features) >= MIN_MID_FEATURES
    )


def make_job(
    names: Sequence[str],
    weights: Sequence[Tensor],
    importance: Mapping[str, Importance],
    config: CompressionConfig,
) -> FactorJob:
    """Plan one factorization: stack the importances and choose R for the wanted bits."""
    rows = [weight.shape[0] for weight in weights]
    known = [importance.get(name) for name in names]
    if all(item is None for item in known):
        combined = None
    else:
        combined = Importance.stack([item or Importance() for item in known], rows)
    in_features = weights[0].shape[1]
    mid_features = mid_features_for(config.bits_for(names[0]), in_features, sum(rows))
    return FactorJob(tuple(names), tuple(weights), combined, mid_features)


def run_jobs(jobs: Sequence[FactorJob], config: CompressionConfig) -> list[DoubleBinaryFactors]:
    """Factor every job, or take its factors from the cache.

    Weights on the CPU are factored by one thread per core; weights on an accelerator one after the other.

    Args:
        jobs: what to factor.
        config: settings; ``cache_dir`` and ``progress`` are read here.

    Returns:
        The factors of the stacked weights, in the order of ``jobs``, on the device of the weights.

    Raises:
        WeightError: a weight cannot be factored; the message names its layer.
    """
    settings = FactorizerConfig(iterations=config.iterations, seed=config.seed)
    cache = FactorCache(config.cache_dir)
    keys = [content_key(job.stacked, job.mid_features, job.importance, settings) for job in jobs]
    found = {key: factors for key in dict.fromkeys(keys) if (factors := cache.get(key)) is not None}
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in found}

    def work(key: str, job: FactorJob) -> tuple[str, FactorJob, DoubleBinaryFactors]:
        try:
            factors = factorize(job.stacked, job.mid_features, job.importance, settings)
        except DBFError as error:
            raise error.inside(" + ".join(job.names)) from error
        cache.put(key, factors)
        return key, job, factors

    if missing:
        on_cpu = all(job.weights[0].device.type == "cpu" for job in missing.values())
        with _one_thread_each(min(len(missing), (os.cpu_count() or 1) if on_cpu else 1)) as pool:
            # Long jobs first: the last thread to finish then has little left to do.
            queue = sorted(missing.items(), key=lambda item: -item[1].mid_features * item[1].stacked.numel())
            futures = [pool.submit(work, key, job) for key, job in queue]
            total = sum(job.stacked.numel() for job in missing.values())
            with tqdm(total=total, unit="weight", unit_scale=True, desc="factoring", disable=not config.progress) as bar:
                try:
                    for future in as_completed(futures):
                        key, job, factors = future.result()
                        found[key] = factors
                        bar.set_postfix_str(job.names[-1], refresh=False)
                        bar.update(job.stacked.numel())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [found[key].to(job.weights[0].device) for key, job in zip(keys, jobs, strict=True)]


def factorize_model(
    model: nn.Module, config: CompressionConfig, importance: Mapping[str, Importance] | None = None
) -> dict[str, DoubleBinaryFactors]:
    """Factor the dense linear layers of a model.

    Args:
        model: any module; its weights are read, not changed.
        config: bits, overrides, skips and settings of the factorizer.
        importance: layer name to second moments, as made by ``calibrate``.

    Returns:
        Layer name to factors; layers factored together share the tensors of their first stage.
    """
    layers = {
        name: weight
        for name, module in dense_linears(model).items()
        if (weight := dense_weight(module)).device.type != "meta"
        and not _is_output_head(model, module)
        and wants(name, *weight.shape, config)
    }
    jobs = [
        make_job(group, [layers[name] for name in group], importance or {}, config)
        for group in _sibling_groups(layers, config)
    ]
    made: dict[str, DoubleBinaryFactors] = {}
    for job, factors in zip(jobs, run_jobs(jobs, config), strict=True):
        made.update(zip(job.names, factors.split([w.shape[0] for w in job.weights]), strict=True))
    return {name: made[name] for name in layers}


def convert_(
    model: nn.Module,
    factors: Mapping[str, DoubleBinaryFactors] | None = None,
    *,
    importance: Mapping[str, Importance] | None = None,
    **options: Any,
) -> nn.Module:
    """Turn the dense linear layers of a model into ``DoubleBinaryLinear``, in place.

    Args:
        model: any module with ``nn.Linear`` or GPT-2's Conv1D layers.
        factors: ready factors by layer name; None to make them now, from ``options``.
        importance: layer name to second moments, as made by ``calibrate``.
        **options: fields of CompressionConfig: ``bits_per_weight``, ``overrides``, ``skip``, ``seed`` …

    Returns:
        ``model``.

    Raises:
        OptionError: an unknown or ill-typed option.
        ConversionError: factors that do not fit the model, or nothing to convert.
    """
    config = parse(CompressionConfig, options)
    made = factorize_model(model, config, importance) if factors is None else factors
    if not made:
        raise ConversionError(
            f"{type(model).__name__} without a linear layer to factor",
            "nn.Linear or Conv1D layers that are neither skipped nor too small",
            f"check skip={config.skip} and bits_per_weight={config.bits_per_weight}",
        )
    return swap_(model, made)


def _sibling_groups(
    layers: Mapping[str, Tensor], config: CompressionConfig
) -> Iterable[tuple[str, ...]]:
    grouped: dict[tuple[str, object], list[str]] = {}
    for name, weight in layers.items():
        parent, _, child = name.rpartition(".")
        family = next((s for s in SIBLINGS if child in s), None) if config.merge_shared_inputs else None
        alike = (family, weight.shape[1], weight.dtype, weight.device, config.bits_for(name))
        grouped.setdefault((parent, alike) if family else (name, None), []).append(name)
    return (tuple(names) for names in grouped.values())


def _is_output_head(model: nn.Module, module: nn.Module) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    return callable(get_head) and get_head() is module


@contextmanager
def _one_thread_each(workers: int) -> Any:
    """Yield a thread pool whose torch operations use one thread, and restore the caller's number after it."""
    threads = torch.get_num_threads()
    if workers == 1:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
