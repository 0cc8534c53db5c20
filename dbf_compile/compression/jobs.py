"""Factorization jobs: all cores busy, every result kept on disk the moment it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dbf_compile.compression.admm import FactorizerConfig, factorize
from dbf_compile.compression.cache import FactorCache, content_key
from dbf_compile.compression.importance import Importance
from dbf_compile.errors import DBFError
from dbf_compile.factors import DoubleBinaryFactors


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
        return self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)

    @property
    def size(self) -> int:
        """The number of weights, Σ N_i · K."""
        return sum(weight.numel() for weight in self.weights)


def run_jobs(
    jobs: Sequence[FactorJob], config: FactorizerConfig, cache: FactorCache, progress: bool
) -> list[DoubleBinaryFactors]:
    """Factor every job, or take its factors from the cache.

    Weights on the CPU are factored by one thread per core, weights on an accelerator one after the other. A run that
    is stopped has lost only the weights it was working on.

    Args:
        jobs: what to factor; equal content is factored once.
        config: settings of the factorizer.
        cache: where results are looked up and kept.
        progress: show a progress bar.

    Returns:
        The factors of the stacked weights, in the order of ``jobs``, on the device of the weights.

    Raises:
        WeightError: a weight cannot be factored; the message names its layer.
    """
    keys = [content_key(job.stacked, job.mid_features, job.importance, config) for job in jobs]
    found = {key: factors for key in dict.fromkeys(keys) if (factors := cache.get(key)) is not None}
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in found}

    def work(key: str, job: FactorJob) -> tuple[str, DoubleBinaryFactors]:
        try:
            factors = factorize(job.stacked, job.mid_features, job.importance, config)
        except DBFError as error:
            raise error.inside(" + ".join(job.names)) from error
        cache.put(key, factors)
        return key, factors

    if missing:
        on_cpu = all(job.weights[0].device.type == "cpu" for job in missing.values())
        workers = min(len(missing), os.cpu_count() or 1) if on_cpu else 1
        total = sum(job.size for job in missing.values())
        bar = tqdm(total=total, unit="weight", unit_scale=True, desc="factoring", disable=not progress)
        with bar, _pool(workers) as pool:
            # Long jobs first: the last thread to finish then has little left to do.
            queue = sorted(missing.items(), key=lambda item: -item[1].mid_features * item[1].size)
            futures: dict[Future[tuple[str, DoubleBinaryFactors]], FactorJob] = {
                pool.submit(work, key, job): job for key, job in queue
            }
            try:
                for future in as_completed(futures):
                    key, factors = future.result()
                    found[key] = factors
                    bar.set_postfix_str(futures[future].names[-1], refresh=False)
                    bar.update(futures[future].size)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [found[key].to(job.weights[0].device) for key, job in zip(keys, jobs, strict=True)]


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool; several workers use one thread each inside torch, and the caller's number is restored."""
    if workers == 1:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
