"""Factorization jobs: all cores busy, every result kept on disk the moment it is there."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dbf_compile.compression.cache import FactorCache, content_key
from dbf_compile.errors import DBFError
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize_batch
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors, stored_bits


def joined(names: Sequence[str]) -> str:
    """Return the name of what is factored as one: the names of its layers joined by " + "."""
    return " + ".join(names)


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
    def name(self) -> str:
        """The names of its layers as one."""
        return joined(self.names)

    @property
    def out_features(self) -> int:
        """Σ N_i."""
        return sum(weight.shape[0] for weight in self.weights)

    @property
    def in_features(self) -> int:
        """K."""
        return self.weights[0].shape[1]

    @property
    def stacked(self) -> Tensor:
        """The weight that is factored, [Σ N_i, K]."""
        return self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)

    @property
    def kind(self) -> Hashable:
        """Equal for jobs that can be factored in one batch."""
        moments = self.importance or Importance()
        sides = (moments.input_second_moment, moments.output_grad_second_moment)
        whole = tuple(moment is not None and moment.dim() == 2 for moment in sides)
        return (self.out_features, self.in_features, self.mid_features, whole)

    @property
    def size(self) -> int:
        """The number of weights, Σ N_i · K."""
        return self.out_features * self.in_features


_Batch = list[tuple[str, FactorJob]]
_BATCHED_WEIGHTS = 2**23  # larger ones keep a GPU busy on their own


def run_jobs(
    jobs: Sequence[FactorJob], config: FactorizerConfig, cache: FactorCache, progress: bool
) -> list[DoubleBinaryFactors]:
    """Factor every job, or take its factors from the cache.

    Weights on the CPU are factored by one thread per core, weights on an accelerator one after the other, small ones
    of one shape together. A run that is stopped has lost only the weights it was working on.

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

    def work(batch: _Batch) -> list[tuple[str, DoubleBinaryFactors]]:
        jobs = [job for _, job in batch]
        names = ", ".join(job.name for job in jobs)
        size, done = sum(job.size for job in jobs), 0

        def advance(fraction: float) -> None:
            nonlocal done
            step = int(fraction * size) - done
            done += step
            bar.update(step)

        try:
            made = factorize_batch(
                [job.stacked for job in jobs],
                jobs[0].mid_features,
                [job.importance for job in jobs],
                config,
                progress=advance,
            )
        except DBFError as error:
            raise error.inside(names) from error
        for (key, _), factors in zip(batch, made, strict=True):
            cache.put(key, factors)
        bar.set_postfix_str(names, refresh=False)
        return [(key, factors) for (key, _), factors in zip(batch, made, strict=True)]

    if missing:
        on_cpu = all(job.weights[0].device.type == "cpu" for job in missing.values())
        batches = _batches(missing)
        workers = min(len(batches), os.cpu_count() or 1) if on_cpu else 1
        total = sum(job.size for job in missing.values())
        bar = tqdm(total=total, unit="weight", unit_scale=True, desc="factoring", disable=not progress)
        with bar, _pool(workers) as pool:
            futures: list[Future[list[tuple[str, DoubleBinaryFactors]]]] = [
                pool.submit(work, batch) for batch in batches
            ]
            try:
                for future in as_completed(futures):
                    found.update(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [found[key].to(job.weights[0].device) for key, job in zip(keys, jobs, strict=True)]


def _batches(missing: dict[str, FactorJob]) -> list[_Batch]:
    """Return the jobs in batches, long ones first: the last thread to finish then has little left to do.

    A core of a CPU is busy with any single weight; small weights on an accelerator share their launches.
    """
    alike: dict[Hashable, _Batch] = {}
    for key, job in missing.items():
        device = job.weights[0].device
        group = key if device.type == "cpu" else (device, job.kind)
        alike.setdefault(group, []).append((key, job))
    batches = []
    for batch in alike.values():
        count = max(1, _BATCHED_WEIGHTS // batch[0][1].size)
        batches += [batch[start : start + count] for start in range(0, len(batch), count)]
    return sorted(batches, key=lambda batch: -sum(job.mid_features * job.size for _, job in batch))


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


@dataclass(frozen=True)
class Part:
    """One weight, or several factored as one, in the whole of a model.

    Args:
        job: what is factored.
        block: number of the block it lies in, or None.
        result: name of the result that holds its factors: its block's, or its own.
    """

    job: FactorJob
    block: int | None
    result: str

    @staticmethod
    def of(job: FactorJob, blocks: Iterable[str], mode: str) -> Part:
        """Return the part of a job; ``mode`` is "block" where blocks are factored as a whole."""
        for number, name in enumerate(blocks):
            if all(each.startswith(f"{name}.") for each in job.names):
                return Part(job, number, name if mode == "block" else job.names[0])
        return Part(job, None, job.names[0])

    @property
    def alone(self) -> bool:
        """Whether it has a result of its own."""
        return self.result == self.job.names[0]

    @property
    def stored(self) -> int:
        """The bits its factors are stored in."""
        return stored_bits(self.job.in_features, self.job.mid_features, self.job.out_features)
