"""One compression of a model on its way: what it works on, and its steps.

    statistics     second moments of all layers          <output>.work/importance.safetensors
    budget         a middle dimension for every weight   <output>.work/allocation.json
    factors        of every weight, or of every block    <output>.work/<name>.safetensors
    distillation   of all scales                         <output>.work/distilled.safetensors
    the folder     written beside, moved into place      <output>

Every step is one result of :class:`~dbf_compile.run.work.Work`: made once, by whichever process comes first, and
found again by all others and by a run that goes on after a crash.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dbf_compile.calibration.batches import token_batches
from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.calibration.compare import compare
from dbf_compile.calibration.model_io import is_causal, to_device, token_ids
from dbf_compile.calibration.offload import blocks_of, offloaded
from dbf_compile.calibration.statistics import load_importance, save_importance
from dbf_compile.calibration.streams import record
from dbf_compile.compression.blocks import BlockRecipe, BlockResult, compress_block, factored_copy
from dbf_compile.compression.coverage import coverage
from dbf_compile.compression.curves import allocate
from dbf_compile.compression.distillation import distill
from dbf_compile.compression.jobs import FactorJob, Part
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.errors import ConversionError, DBFError, OptionError
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize, weighted_error
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import DoubleBinaryFactors, move_factors
from dbf_compile.files import new_folder_mode, write_text
from dbf_compile.hashes import batches_hash, model_hash, source_hash
from dbf_compile.integrations.experts import unfuse_
from dbf_compile.linear import swap_
from dbf_compile.machine import chosen_device
from dbf_compile.options import PRESETS, CompressionConfig, CompressOptions
from dbf_compile.run.page import write_report
from dbf_compile.run.report import _PAGE, _REPORT, outcome, report_of, surroundings
from dbf_compile.run.work import RESUME, Made, Work

_LEAST_SHARE = 0.5  # of the weights, below which a user should know
# The packages that decide on what a run makes of a model.
_PROGRAM = tuple(
    f"dbf_compile.{name}" for name in ("calibration", "factorizer", "compression", "run", "integrations")
)
_NOT_FOR_RESULTS = ("progress", "cache_dir", "max_shard_size")


@dataclass
class Run:
    """One call of ``compress``: what it works on, and its steps."""

    output: Path
    model: nn.Module  # dense, its experts unfused
    source: Path | None
    tokenizer: Any
    config: CompressOptions
    batches: list[Any]
    judging: list[Any]
    device: torch.device
    facts: dict[str, Any]
    work: Work
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def opened(
        given: str | Path | nn.Module,
        output: Path,
        config: CompressOptions,
        data: Any,
        batches: Sequence[Any] | None,
        tokenizer: Any,
        resume: str,
        device: torch.device | str | None,
        trust_remote_code: bool,
    ) -> Run | None:
        """Check the arguments, open the model without reading it, and take up the work; None where all is done."""
        from dbf_compile.integrations import pretrained

        _check(given, output, config, data, batches, resume)
        if isinstance(given, nn.Module):
            source, model, name = None, _view_of(given).eval().requires_grad_(False), type(given).__name__
            content = model_hash(model)
        else:
            source, name = pretrained.local_folder(given), Path(given).name
            model, content = pretrained.open_dense(source, trust_remote_code), pretrained.content_hash(source)
        if data is not None and tokenizer is None:
            tokenizer = pretrained.tokenizer_of(source, trust_remote_code)
        every = list(batches or [])
        if data is not None:
            wanted = config.windows + config.holdout
            every = list(token_batches(data, tokenizer, length=config.length, count=wanted))
        kept = min(config.holdout, len(every) // 5)  # little data is needed to calibrate
        calibrating, judging = every[: len(every) - kept], every[len(every) - kept :]
        facts: dict[str, Any] = {
            "model": {
                "name": name,
                "architecture": type(model).__name__,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "hash": content,
            },
            "data": {
                "source": _source_name(data, bool(every)),
                "hash": batches_hash(every),
                "windows": len(calibrating),
                "tokens": sum(_tokens(batch) for batch in calibrating),
            },
        }
        if config.mode == "auto":
            config = replace(config, mode="block" if every else "independent")
        settings = {key: value for key, value in asdict(config).items() if key not in _NOT_FOR_RESULTS}
        fingerprint = {
            "model": content,
            "data": facts["data"]["hash"],
            "settings": settings,
            "program": source_hash(*_PROGRAM),
        }
        if output.exists():
            if report_of(output).get("fingerprint") == json.loads(json.dumps(fingerprint)):
                return None
            raise OptionError(
                f"output {output}, which exists", "a path where nothing is", "remove it, or choose another"
            )
        facts["fingerprint"] = fingerprint
        work = Work(output.with_name(output.name + ".work"), fingerprint, resume)
        unfuse_(model)
        where = chosen_device(device)
        calibrating, judging = ([to_device(batch, where) for batch in part] for part in (calibrating, judging))
        return Run(output, model, source, tokenizer, config, calibrating, judging, where, facts, work)

    def finish(self, workers: int) -> None:
        """Make what is missing, and the folder."""
        with self.work.exclusive("output"):
            if self.output.exists():
                return  # another worker was faster
        began = time.perf_counter()
        with self._timed("calibrate"):
            importance = self._importance()
        with self._timed("allocate"):
            allocation = self._allocation(importance)
        jobs = LayerFactorizer(self.config, importance, mid_features=allocation).jobs(self.model)
        if not jobs:
            raise ConversionError(
                f"{type(self.model).__name__} without a linear layer to factor",
                "nn.Linear or Conv1D layers that are neither skipped nor too small",
                f"check skip={list(self.config.skip)} and bits={self.config.bits_per_weight}",
            )
        covered = coverage(self.model, {name for job in jobs for name in job.names}, self.config)
        if covered["share"] < _LEAST_SHARE:
            largest = ", ".join(f"{row['name']} ({row['reason']})" for row in covered["dense"][:3])
            warnings.warn(
                f"only {covered['share']:.0%} of the weights are factored; the largest others: {largest}",
                stacklevel=4,
            )
        blocks = blocks_of(self.model, [job.names[0] for job in jobs])
        parts = [Part.of(job, blocks, self.config.mode) for job in jobs]
        with self._timed("factor"):
            self._factor_alone([part for part in parts if part.alone], workers)
            if not all(part.alone for part in parts):
                self._factor_blocks(blocks, [part for part in parts if not part.alone])
        with self._timed("distill"):
            distilled = self._distilled(parts, blocks)
        with self.work.exclusive("output"):
            if not self.output.exists():
                self.seconds["total"] = time.perf_counter() - began
                self._write(parts, blocks, covered, distilled)

    def _importance(self) -> dict[str, Importance]:
        config = self.config

        def make(path: Path) -> None:
            given = self.batches or None
            if given is None and not hasattr(getattr(self.model, "config", None), "vocab_size"):
                return save_importance({}, path)  # it reads something else, and nothing was given
            found = calibrate(self.model, given, form=config.form, device=self.device, seed=config.seed)
            if config.temper is not None:
                found = {name: item.tempered(config.temper) for name, item in found.items()}
            save_importance(found, path)

        return load_importance(self.work.once("importance.safetensors", make))

    def _allocation(self, importance: Mapping[str, Importance]) -> Mapping[str, int] | None:
        if self.config.budget == "equal":
            return None
        known = {item.name: getattr(self.config, item.name) for item in fields(CompressionConfig)}

        def make(path: Path) -> None:
            found = allocate(self.model, importance, **known)
            write_text(path, json.dumps(dict(found.mid_features)))

        return dict(json.loads(self.work.once("allocation.json", make).read_text()))

    def _factor_alone(self, parts: Sequence[Part], workers: int) -> None:
        """Factor weights that have nothing to do with each other, long ones first."""
        by_name = {
            part.result: part.job
            for part in sorted(parts, key=lambda part: -part.job.mid_features * part.job.size)
        }
        missing = sum(job.size for name, job in by_name.items() if not self.work.has(name))
        if not missing:
            return
        stopped = threading.Event()

        def work_off() -> None:
            self.work.all_factors(list(by_name), lambda name: self._factor_one(by_name[name], bar, stopped))

        bar = self._bar("factoring", missing, "weight")
        with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for future in [pool.submit(work_off) for _ in range(workers)]:
                    future.result()
            finally:
                stopped.set()  # where one has failed, or the user has: what the others do can be done again

    def _factor_one(self, job: FactorJob, bar: tqdm[Any], stopped: threading.Event) -> Made:
        began, done = time.perf_counter(), 0

        def advance(fraction: float) -> None:
            nonlocal done
            if stopped.is_set():
                raise _StoppedError
            step = int(fraction * job.size) - done
            done += step
            bar.update(step)

        weight = job.stacked.to(self.device)
        try:
            made = factorize(weight, job.mid_features, job.importance, self._factorizer, progress=advance)
        except DBFError as error:
            raise error.inside(job.name) from error
        facts = {
            "errors": {job.name: weighted_error(weight, made, job.importance)},
            "seconds": {job.name: round(time.perf_counter() - began, 3)},
            "stages": [],
        }
        parts = made.to("cpu").split([part.shape[0] for part in job.weights])
        return dict(zip(job.names, parts, strict=True)), facts

    def _factor_blocks(self, blocks: Mapping[str, nn.Module], parts: Sequence[Part]) -> None:
        """Factor block after block; one process does, the others wait and take over if it dies."""
        jobs = {name: [part.job for part in parts if part.result == name] for name in blocks}
        recipe = BlockRecipe(self.config.tune, self.config.refine, self._factorizer)
        with self.work.exclusive("blocks"):
            if all(self.work.has(part.result) for part in parts):
                return
            with offloaded(self.model, list(blocks.values()), self.device):
                streams = record(self.model, list(blocks.values()), self.batches)
            dense = compressed = streams.hidden
            with self._bar("blocks", sum(part.job.size for part in parts), "weight") as bar:
                for index, (name, block) in enumerate(blocks.items()):
                    exact = copy.deepcopy(block).to(self.device).float().requires_grad_(False).eval()
                    targets = streams.outputs(exact, index, dense)
                    factors: Mapping[str, DoubleBinaryFactors] = {}
                    if jobs[name]:
                        work = partial(
                            compress_block,
                            name,
                            index,
                            exact,
                            jobs[name],
                            streams,
                            compressed,
                            targets,
                            recipe,
                        )
                        size = sum(job.size for job in jobs[name])
                        factors = self.work.factors(name, partial(_factored, work, size, bar))[0]
                    compressed = streams.outputs(factored_copy(exact, name, factors), index, compressed)
                    dense = targets

    def _distilled(self, parts: Sequence[Part], blocks: Iterable[str]) -> dict[str, Any] | None:
        """Return what distillation gained, or None where it is not done; its factors are the result "distilled"."""
        if not (self.config.distill and self.batches and is_causal(self.model)):
            return None

        def make() -> Made:
            began = time.perf_counter()
            student = self._student(self._all_factors(parts))
            before = self._judged(student, blocks)
            steps = self.config.distill * len(self.batches)
            with self._visiting(student, blocks), self._bar("distilling", steps, "step") as bar:
                made = distill(
                    self.model,
                    student,
                    self.batches,
                    self.config.distill,
                    self.config.seed,
                    lambda: bar.update(1),
                    self.device,
                )
            after = self._judged(self._student(made), blocks)
            seconds = round(time.perf_counter() - began, 3)
            return made, {"before": before, "after": after, "seconds": seconds}

        return self.work.factors("distilled", make)[1]

    def _student(self, factors: Mapping[str, DoubleBinaryFactors]) -> nn.Module:
        return swap_(_view_of(self.model), factors)

    def _judged(self, student: nn.Module, blocks: Iterable[str]) -> dict[str, Any]:
        with self._visiting(student, blocks):
            return compare(self.model, student, self.judging)

    @contextmanager
    def _visiting(self, student: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
        """Let the blocks of both models visit the device, one at a time, where the models are elsewhere."""
        if next(self.model.parameters()).device == self.device:
            yield
            return
        with ExitStack() as stack:
            for model in (self.model, student):
                visitors = [model.get_submodule(name) for name in blocks]
                stack.enter_context(offloaded(model, visitors, self.device))
            yield

    def _all_factors(self, parts: Sequence[Part]) -> dict[str, DoubleBinaryFactors]:
        found: dict[str, DoubleBinaryFactors] = {}
        for name in dict.fromkeys(part.result for part in parts):
            found |= self.work.read(name)[0]
        return found

    @property
    def _factorizer(self) -> FactorizerConfig:
        config = self.config
        iterations = PRESETS[config.preset] if config.iterations is None else config.iterations
        return FactorizerConfig(iterations=iterations, seed=config.seed)

    def _bar(self, what: str, total: int, unit: str) -> tqdm[Any]:
        return tqdm(total=total, unit=unit, unit_scale=True, desc=what, disable=not self.config.progress)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)

    def _write(
        self,
        parts: Sequence[Part],
        blocks: Iterable[str],
        covered: Mapping[str, Any],
        distilled: Mapping[str, Any] | None,
    ) -> None:
        """Write the folder beside the output and move it there."""
        from dbf_compile.integrations import pretrained

        results = list(dict.fromkeys(part.result for part in parts))
        facts = {name: self.work.read(name)[1] for name in results}
        if distilled is None:
            evaluation = self._judged(self._student(self._all_factors(parts)), blocks)
        else:
            evaluation = distilled["after"]
        layers = {
            name: {
                "mid_features": part.job.mid_features,
                "shares_first_stage_with": None if name == part.job.names[0] else part.job.names[0],
            }
            for part in parts
            for name in part.job.names
        }
        result_of = {name: part.result for part in parts for name in part.job.names}
        if distilled is not None:
            result_of = dict.fromkeys(result_of, "distilled")
        read = lru_cache(maxsize=1)(lambda name: self.work.read(name)[0])
        stored = sum(part.stored for part in parts)
        factored = stored / sum(part.job.size for part in parts)
        # Hidden, so that nobody takes it for a model before it is one; of its own, so that it is not mixed with another.
        folder = Path(tempfile.mkdtemp(dir=self.output.parent, prefix=f".{self.output.name}."))
        try:
            folder.chmod(new_folder_mode())
            size = pretrained.write_model(
                folder,
                self.model,
                layers,
                lambda name: read(result_of[name])[name],
                factored,
                self.config.max_shard_size,
                self.source,
                self.tokenizer,
            )
            report = {
                **self.facts,
                "settings": json.loads(json.dumps(asdict(self.config))),
                "bits": {
                    "target": self.config.bits_per_weight,
                    "factored": factored,
                    "file": 8 * size / covered["weights"],
                },
                "coverage": dict(covered),
                **outcome(parts, facts, distilled),
                "evaluation": evaluation,
                "time": self.seconds,
                **surroundings(self.device),
            }
            write_text(folder / _REPORT, json.dumps(report, indent=1) + "\n")
            write_report(report, folder / _PAGE)
            folder.rename(self.output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _factored(work: Callable[..., BlockResult], size: int, bar: tqdm[Any]) -> Made:
    """Factor a block of ``size`` weights, and tell the bar."""
    before = bar.n

    def tell(share: float) -> None:
        bar.update(int(before + share * size) - bar.n)

    found = work(progress=tell)
    facts = {"errors": found.errors, "seconds": found.seconds, "stages": found.stages}
    return move_factors(found.factors, dict.fromkeys(found.factors, torch.device("cpu"))), facts


class _StoppedError(Exception):
    """Another thread has failed, or the user wants to stop."""


def _check(given: Any, output: Path, config: CompressOptions, data: Any, batches: Any, resume: str) -> None:
    if not output.parent.is_dir():
        raise OptionError(
            f"output {output}, whose parent is no folder", "a folder that exists", "make it first"
        )
    if resume not in RESUME:
        raise OptionError(f"resume={resume!r}", ", ".join(map(repr, RESUME)), "leave it at 'auto'")
    if data is not None and batches is not None:
        raise OptionError("data and batches", "one of them", "pass text as data, or ready batches")
    if config.mode == "block" and data is None and not batches:
        raise OptionError(
            "mode='block' without data", "data or batches", "pass data='text.txt', or mode='independent'"
        )
    if isinstance(given, nn.Module) and not hasattr(given, "config"):
        raise ConversionError(
            f"a model of type {type(given).__name__}",
            "a model of transformers, its folder, or its name on the Hub",
            "use dbf_compile.convert_ for other modules",
        )


def _view_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares all its tensors: layers can be replaced without a trace in the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _source_name(data: Any, given: bool) -> str:
    if isinstance(data, (str, Path)):
        return str(data)
    return "given" if given else "random tokens"


def _tokens(batch: Any) -> int:
    ids = token_ids(batch)
    return 0 if ids is None else ids.numel()
