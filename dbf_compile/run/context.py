"""What the steps of a run share: the request, the durable work, the judge, progress and time; and what is factored where."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn
from tqdm import tqdm

from dbf_compile.calibration.compare import compare, compare_kinds
from dbf_compile.calibration.offload import offloaded
from dbf_compile.compression.jobs import FactorJob
from dbf_compile.compression.layers import factorizer_config
from dbf_compile.compression.tables import make_tables
from dbf_compile.factorizer.factorize import FactorizerConfig
from dbf_compile.factors import DoubleBinaryFactors, stored_bits
from dbf_compile.linear import swap_
from dbf_compile.progress import bar, over
from dbf_compile.run.request import Request, view_of
from dbf_compile.run.work import Work
from dbf_compile.tables import QuantizedRows, swap_tables_


@dataclass(frozen=True)
class PlacedJob:
    """A job and its place in the model.

    Args:
        job: what is factored.
        block: index of the block it lies in, or None.
        result: name of the result that holds its factors: its block's, or its own.
    """

    job: FactorJob
    block: int | None
    result: str

    @staticmethod
    def of(job: FactorJob, blocks: Iterable[str], in_turn: Collection[str]) -> PlacedJob:
        """Find the block of a job; the factors of a block that is one of ``in_turn`` are one result."""
        for index, name in enumerate(blocks):
            if all(layer.startswith(f"{name}.") for layer in job.names):
                return PlacedJob(job, index, name if name in in_turn else job.names[0])
        return PlacedJob(job, None, job.names[0])

    @property
    def alone(self) -> bool:
        """Whether it has a result of its own."""
        return self.result == self.job.names[0]

    @property
    def stored_bits(self) -> int:
        """The bits of its factors."""
        return stored_bits(self.job.in_features, self.job.mid_features, self.job.out_features)


@dataclass(frozen=True)
class Plan:
    """What is factored, and where it lies in the model.

    Args:
        blocks: the blocks of the transformer by name, in order.
        stacks: the blocks that are compressed one after the other, by name, row after row; none in mode "independent".
        placed: the jobs.
        coverage: which share of the weights they are, as of :func:`~dbf_compile.compression.coverage.coverage`.
    """

    blocks: Mapping[str, nn.Module]
    stacks: Sequence[Sequence[str]]
    placed: Sequence[PlacedJob]
    coverage: Mapping[str, Any]

    @property
    def results(self) -> list[str]:
        """Names of the results that hold the factors."""
        return list(dict.fromkeys(placed.result for placed in self.placed))


@dataclass
class Run:
    """One compression on its way.

    Args:
        request: what to do.
        work: durable results.
        seconds: time by step.
    """

    request: Request
    work: Work
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def factorizer(self) -> FactorizerConfig:
        """The settings of the factorizer."""
        return factorizer_config(self.request.config)

    def bar(self, description: str, total: int, unit: str) -> tqdm[Any]:
        """Return a progress bar."""
        return bar(description, total, unit, self.request.config.progress)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note how long a step takes."""
        began = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - began, 3)

    def write_own_text(self) -> None:
        """Let the model write what it is to write itself; from then on it is part of the data."""
        config = self.request.config
        self.request = replace(self.request, data=self.request.data.written(self.work, config.progress))

    @cached_property
    def tables(self) -> dict[str, QuantizedRows]:
        """The tables of embeddings and heads, by layer."""
        return make_tables(self.request.model, self.request.config)

    def student(self, factors: Mapping[str, DoubleBinaryFactors]) -> nn.Module:
        """Return the compressed model; it shares what stays dense with the dense one."""
        return swap_tables_(swap_(view_of(self.request.model), factors), self.tables)

    def all_factors(self, plan: Plan) -> dict[str, DoubleBinaryFactors]:
        """Return the factors of all layers by name."""
        factors: dict[str, DoubleBinaryFactors] = {}
        for name in plan.results:
            factors |= self.work.read(name)[0]
        return factors

    def judge(self, student: nn.Module, blocks: Iterable[str]) -> dict[str, Any]:
        """Compare the compressed model with the dense one on the batches kept back."""
        with self.offloaded(student, blocks):
            kinds = self.request.data.judging
            bars = {
                kind: over(
                    batches,
                    f"judging {kind}" if len(kinds) > 1 else "judging",
                    "batch",
                    self.request.config.progress,
                )
                for kind, batches in kinds.items()
            }
            if len(kinds) > 1:
                return compare_kinds(self.request.model, student, bars)
            return compare(self.request.model, student, next(iter(bars.values()), ()))

    @contextmanager
    def offloaded(self, student: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
        """Onload the blocks of both models one at a time, where the models are not on the device already."""
        request = self.request
        if next(request.model.parameters()).device == request.device:
            yield
            return
        with ExitStack() as stack:
            for model in (request.model, student):
                modules = [model.get_submodule(name) for name in blocks]
                stack.enter_context(offloaded(model, modules, request.device))
            yield
