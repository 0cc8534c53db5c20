"""What each choice of sequential mode gains and costs on SmolLM2-135M: its first blocks at 2 bits, judged on five kinds of text.

A whole model takes an hour or more. So the first blocks alone are factored, and all others stay dense: the divergence is small
then, but the same windows judge all choices, and it is that of the whole model's predictions. "seed 1" says how far apart two
runs of one choice are; a smaller gain is none. The last stage, distillation, is left out.

Rows lie in out/choices/rows, a file a choice: a run that was stopped goes on. Results are written to results/choices.csv. Rows of
other code are not told apart: --fresh.

    python benchmarks/bench_choices.py                              all: some five hours on two cores
    python benchmarks/bench_choices.py --choice usual "125 turns"   some
    python benchmarks/bench_choices.py --list                       their names, and which are done
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import bench_llm
import torch
from llm_rows import WINDOWS as CALIBRATING
from llm_rows import Row, Store, in_turn
from measure import processor, versions, write_results
from transformers import AutoModelForCausalLM

from dbf_compile.options import DENSE_BY_DEFAULT

FOLDER = Path(__file__).parents[1] / "out" / "choices"
BLOCKS, WINDOWS = 4, 8
CHOICES: dict[str, dict[str, Any]] = {
    "usual": {},
    "seed 1": {"seed": 1},
    "128 windows, 2 epochs": {"windows": 128},
    "256 windows, 1 epoch": {"windows": 256},
    "125 turns": {"iterations": 125},
    "600 turns": {"iterations": 600},
    "no tuning": {"tune": 0},
    "2 epochs of tuning": {"tune": 2},
    "no refining": {"refine": 0},
    "4 epochs of refining": {"refine": 4},
    "whole input moments": {"curvature": "input"},
    "whole input moments, 100 turns": {"curvature": "input", "iterations": 100},
    "tempered": {"temper": 0.5},
    "tempered input moments": {"curvature": "input", "temper": 0.5},
    "Kronecker, tempered": {"curvature": "kronecker", "temper": 0.5},
    "allocated bits": {"budget": "allocated"},
    "own first stages": {"merge_shared_inputs": False},
    "half own text": {"own_text": 0.5},
}


@dataclass(frozen=True)
class Choice(Row):
    """Options of ``compress`` that differ from the usual ones.

    Args:
        label: what it is called.
        options: that differ.
    """

    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its file is called."""
        return "-".join(self.label.replace(",", "").split())

    @property
    def minutes(self) -> float:
        """On two idle cores."""
        return 16.0


def main() -> None:
    arguments = parse_arguments()
    if arguments.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    choices = [
        Choice(
            "sequential",
            2.0,
            "mixture",
            options.get("seed", 0),
            options.get("windows", arguments.calibrating),
            label=label,
            options={name: value for name, value in options.items() if name != "windows"},
        )
        for label, options in CHOICES.items()
        if label in arguments.choice
    ]
    setting = setting_of(arguments)
    store = Store(
        FOLDER, {**setting.facts(), "blocks": arguments.blocks, "calibrating": arguments.calibrating}
    )
    if arguments.list:
        for choice in choices:
            print(f"{'done' if store.has(choice) else '    '}  {choice.label}")
        return
    print(f"{processor()}; {versions()}", flush=True)
    run(choices, setting, store)
    print(f"written to {write(store)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--choice", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="NAME")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="that are factored")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of every kind, to judge with")
    parser.add_argument(
        "--calibrating", type=int, default=CALIBRATING, help="windows, where a choice has no others"
    )
    parser.add_argument("--list", action="store_true", help="print the choices, and measure nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    return parser.parse_args()


def setting_of(arguments: argparse.Namespace) -> bench_llm.Setting:
    shared = argparse.Namespace(windows=arguments.windows, preset="fast", text=[])
    setting = bench_llm.full_setting(shared)
    layers = AutoModelForCausalLM.from_pretrained(setting.dense).config.num_hidden_layers
    dense = [f"*layers.{block}.*" for block in range(arguments.blocks, layers)]
    return replace(setting, options={**setting.options, "skip": [*DENSE_BY_DEFAULT, *dense], "distill": 0})


def run(choices: Sequence[Choice], setting: bench_llm.Setting, store: Store) -> None:
    dense = AutoModelForCausalLM.from_pretrained(setting.dense, dtype=torch.float32)
    dense.eval().requires_grad_(False)
    columns = [(name, length, list(batches)) for name, length, batches in setting.judged() if "," not in name]
    for choice in in_turn(choices, store):
        began = time.monotonic()
        own = replace(setting, options={**setting.options, **choice.options})
        model, stored, facts = bench_llm.ours(choice, dense, own, store)
        seconds = time.monotonic() - began
        kinds = bench_llm.judge(dense, model, columns)
        store.add(choice, {"stored_bits": stored, "seconds": seconds, "kinds": kinds, **facts})
        shutil.rmtree(bench_llm.model_folder(choice, store))
        bench_llm.print_row(choice, stored, seconds, kinds)


def write(store: Store) -> Path:
    """Write ``results/choices.csv``, a line a choice, in the order of this file."""
    results = {result["label"]: result for result in store.results()}
    rows = []
    for label in (label for label in CHOICES if label in results):
        result = results[label]
        divergences = {kind: figures["kl"] for kind, figures in result["kinds"].items()}
        factored = sum(
            stage["seconds"] for stage in result["stages"] if not str(stage["stage"]).startswith("step:")
        )
        rows.append(
            {
                "choice": label,
                "bits": round(result["stored_bits"], 4),
                "mean_kl": round(fmean(divergences.values()), 5),
                "worst_kl": round(max(divergences.values()), 5),
                **{kind: round(value, 5) for kind, value in divergences.items()},
                "seconds_of_blocks": round(factored, 1),
                **result["provenance"],
            }
        )
    return write_results("choices", rows)


if __name__ == "__main__":
    main()
