"""The one factoring engine: all cores busy, every result in a store the moment it is there.

The store decides what a result is called, whether it exists, and who makes it: the factor cache
(:mod:`~dbf_compile.compression.cache`) by the content of the weight, the durable work of a run
(:mod:`~dbf_compile.run.work`) by the names of the layers, under locks that other processes see.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dbf_compile.errors import DBFError
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize_batch
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.machine import default_workers
from dbf_compile.progress import bar, over

# The number of a member of a list: experts.3.down_proj, expert_3.wo
MEMBER = re.compile(r"(?<=[._])\d+(?=\.|$)")
_BATCHED_WEIGHTS = 2**23  # larger ones keep a GPU busy on their own
_BATCHED_JOBS = 256  # a run holds an open lock for each
_POLL_SECONDS = 0.2


def joined(names: Sequence[str]) -> str:
    """Return the name of layers that are factored as one: their names joined by " + "."""
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
    def rows(self) -> list[int]:
        """N_i of every weight."""
        return [weight.shape[0] for weight in self.weights]

    @property
    def out_features(self) -> int:
        """Σ N_i."""
        return sum(self.rows)

    @property
    def in_features(self) -> int:
        """K."""
        return self.weights[0].shape[1]

    @property
    def stacked(self) -> Tensor:
        """The weight that is factored, [Σ N_i, K]."""
        return self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)

    @property
    def batch_key(self) -> Hashable:
        """Equal for jobs that can be factored in one batch."""
        moments = self.importance or Importance()
        sides = (moments.input_second_moment, moments.output_grad_second_moment)
        whole = tuple(moment is not None and moment.dim() == 2 for moment in sides)
        return (self.out_features, self.in_features, self.mid_features, whole)

    @property
    def size(self) -> int:
        """The number of weights, Σ N_i · K."""
        return self.out_features * self.in_features


class FactorStore(Protocol):
    """Where the engine looks for results and puts them; used from several threads at once."""

    def key(self, job: FactorJob) -> str:
        """Return the name of a job's result; jobs with equal keys have equal results."""

    def has(self, key: str) -> bool:
        """Return whether the result ``key`` exists."""

    def claim(self, keys: Sequence[str]) -> AbstractContextManager[list[str]]:
        """Yield those of ``keys`` that nobody has made or is making: nobody else gets them inside the block."""

    def put(self, key: str, job: FactorJob, factors: DoubleBinaryFactors, seconds: float) -> None:
        """Store the factors of the stacked weight, and how long they took."""


@dataclass(frozen=True)
class Pool:
    """Threads that factor, and where.

    Args:
        workers: weights at a time, with one thread inside torch for each, so that results do not depend on how many there
            are. None for one a core (one for a GPU), of which a single weight gets all the threads of torch.
        device: where to factor; None for where the weights are.
    """

    workers: int | None = None
    device: torch.device | None = None

    def device_of(self, job: FactorJob) -> torch.device:
        """Return where the job is factored."""
        return self.device or job.weights[0].device


class _StoppedError(Exception):
    """Another thread has failed, or the user wants to stop."""


_Batch = list[tuple[str, FactorJob]]


def run_jobs(
    jobs: Sequence[FactorJob],
    config: FactorizerConfig,
    store: FactorStore,
    progress: bool,
    pool: Pool = Pool(),
    what: str = "factoring",
) -> None:
    """Factor every job whose result is not in the store.

    On a CPU each worker takes one weight at a time. On an accelerator small weights of one shape go together. Long jobs come
    first. A run that is stopped loses only the weights it was working on; when one worker fails, the others stop at their
    next iteration.

    Args:
        jobs: what to factor; jobs of equal key are factored once.
        config: settings of the factorizer.
        store: where results are looked up and kept.
        progress: show progress bars.
        pool: workers and device.
        what: what the bar says.

    Raises:
        WeightError: a weight cannot be factored; the message names its layers.
    """
    by_key: dict[str, FactorJob] = {}
    missing: set[str] = set()
    for job in over(jobs, "looking up", "weight", progress, delay=1.0):  # a key may be a hash of the weight
        key = store.key(job)
        by_key[key] = job
        if not store.has(key):
            missing.add(key)
    if not missing:
        return
    # Batches are made of all jobs, so that results do not depend on which of them exist already.
    batches = [batch for batch in _batches(by_key, pool) if any(key in missing for key, _ in batch)]
    total = sum(by_key[key].size for key in missing)
    with bar(what, total, "weight", progress) as moving:
        worker = _Worker(config, store, pool, moving)
        while batches:
            _run_batches(worker, batches)
            finished = {key for key in missing if store.has(key)}
            # What other processes have made counts as progress.
            moving.update(sum(by_key[key].size for key in finished - worker.own))
            missing -= finished
            batches = [batch for batch in batches if any(key in missing for key, _ in batch)]
            if batches:  # other processes are making these; where one died, its claim is free again
                time.sleep(_POLL_SECONDS)


class _Worker:
    """Factors batches; shared by all threads of a run."""

    def __init__(self, config: FactorizerConfig, store: FactorStore, pool: Pool, bar: tqdm[Any]) -> None:
        self.pool = pool
        self.stopped = threading.Event()
        self._config, self._store, self._bar = config, store, bar
        self.own: set[str] = set()

    def work(self, batch: _Batch) -> None:
        """Factor those jobs of a batch that nobody has made or is making."""
        with self._store.claim([key for key, _ in batch]) as claimed:
            if claimed and not self.stopped.is_set():
                self._factor(batch, claimed)
                self.own.update(claimed)

    def _factor(self, batch: _Batch, claimed: Sequence[str]) -> None:
        """Factor a whole batch, and put the claimed results into the store."""
        jobs = [job for _, job in batch]
        names = ", ".join(job.name for job in jobs)
        size, done = sum(job.size for key, job in batch if key in claimed), 0
        began = time.perf_counter()

        def advance(fraction: float) -> None:
            nonlocal done
            if self.stopped.is_set():
                raise _StoppedError
            step = int(fraction * size) - done
            done += step
            self._bar.update(step)

        try:
            results = factorize_batch(
                [job.stacked.to(self.pool.device_of(job)) for job in jobs],
                jobs[0].mid_features,
                [job.importance for job in jobs],
                self._config,
                progress=advance,
            )
        except DBFError as error:
            raise error.inside(names) from error
        seconds = (time.perf_counter() - began) / len(jobs)
        for (key, job), factors in zip(batch, results, strict=True):
            if key in claimed:
                self._store.put(key, job, factors, seconds)
        self._bar.set_postfix_str(names, refresh=False)


def _run_batches(worker: _Worker, batches: Sequence[_Batch]) -> None:
    devices = {worker.pool.device_of(job) for batch in batches for _, job in batch}
    count = worker.pool.workers or min(default_workers(device) for device in devices)
    # A single weight may use every core; a given number of workers asks for results that do not depend on it.
    alone = worker.pool.workers is None and (len(batches) == 1 or count == 1)
    with _threads(min(count, len(batches)), None if alone else 1) as executor:
        try:
            futures = [executor.submit(worker.work, batch) for batch in batches]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            worker.stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _batches(jobs: dict[str, FactorJob], pool: Pool = Pool()) -> list[_Batch]:
    """Return the jobs in batches, long ones first: the last thread to finish then has little left to do.

    A core of a CPU is busy with any single weight; small weights on an accelerator share their launches.
    """
    alike: dict[Hashable, _Batch] = {}
    for key, job in jobs.items():
        device = pool.device_of(job)
        group = key if device.type == "cpu" else (device, job.batch_key)
        alike.setdefault(group, []).append((key, job))
    batches = []
    for batch in alike.values():
        count = min(_BATCHED_JOBS, max(1, _BATCHED_WEIGHTS // batch[0][1].size))
        batches += [batch[start : start + count] for start in range(0, len(batch), count)]
    return sorted(batches, key=lambda batch: -sum(job.mid_features * job.size for _, job in batch))


@contextmanager
def _threads(workers: int, torch_threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool whose threads use ``torch_threads`` inside torch; the caller's number is restored."""
    if torch_threads is None:
        with ThreadPoolExecutor(workers) as executor:
            yield executor
        return
    with (
        _thread_count.kept(),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(torch_threads,)) as executor,
    ):
        yield executor


class _ThreadCount:
    """The number of torch's threads, which is one for the process: the last of several pools to end restores it."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the number at the end."""
        with self._lock:
            if self._users == 0:
                self._before = torch.get_num_threads()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    torch.set_num_threads(self._before)


_thread_count = _ThreadCount()
