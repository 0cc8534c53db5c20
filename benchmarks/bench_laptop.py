"""Language models on a laptop, beside dense Inductor and llama.cpp: decoding, prefill, memory, time to the first token.

Every variant is a process of its own; in every round each runs once, so that all meet the same machine. Medians are
written to results/laptop.csv. All rows lie in out/laptop/rows.jsonl as they come: a run that was stopped goes on, and runs of
several selections add up. `--fresh` forgets them.

    python benchmarks/bench_laptop.py --bars      what is promised, and whether it holds: about half an hour on two idle cores
    python benchmarks/bench_laptop.py --quick     a few cases of the smallest model
    python benchmarks/bench_laptop.py             all: hours
    python benchmarks/bench_laptop.py --models smollm2-135m --variants "dbf 2 bit" "llama.cpp Q4_1" --threads 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import laptop_llama
from laptop_bars import BARS, print_bars
from laptop_processes import Processes, StoppedError, first_token_seconds
from laptop_sizes import FOLDER, SIZES, SMOLLM, megabytes, prepared
from measure import commit, processor, versions, write_results

ROWS = FOLDER / "rows.jsonl"
OURS = ("dbf 1 bit", "dbf 2 bit", "dbf 3 bit", "dbf 4 bit")
DENSE = "bf16 inductor"
PEERS = tuple(f"llama.cpp {kind}" for kind in ("Q4_1", *laptop_llama.TYPES))
VARIANTS = (*OURS, DENSE, *PEERS)
NEW = 48  # tokens of an answer


class Case(NamedTuple):
    """What is run: a batch of prompts of so many tokens."""

    model: str
    threads: int
    batch: int
    prompt: int


def main() -> None:
    arguments = parse_arguments()
    if arguments.fresh:
        ROWS.unlink(missing_ok=True)
    if not laptop_llama.installed():
        print("llama-cpp-python is not installed: llama.cpp is left out")
    print(f"{processor()}; {versions()}; commit {commit()}", flush=True)
    if arguments.prepare:
        prepare(arguments)
        return
    if arguments.bars:
        for model, variants, cases in BARS:
            measure([Case(model, *case) for case in cases], variants, arguments.rounds)
    else:
        for model, threads in itertools.product(arguments.models, arguments.threads):
            shapes = itertools.product(arguments.batch, arguments.prompt)
            cases = [Case(model, threads, *shape) for shape in shapes]
            measure(cases, variants_of(model, arguments.variants), arguments.rounds)
        if arguments.starts:
            for model in arguments.models:
                measure_starts(model, variants_of(model, arguments.variants), max(arguments.threads))
    rows = medians(read_rows())
    print_table(rows)
    print_bars(rows)
    print(f"written to {write_results('laptop', rows)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bars", action="store_true", help="only what the promises need")
    parser.add_argument("--quick", action="store_true", help="one case of the smallest model, three variants")
    parser.add_argument("--prepare", action="store_true", help="write the models, and measure nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 1024], help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-starts", dest="starts", action="store_false", help="no times of starts")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.variants = [SMOLLM], ["dbf 2 bit", DENSE, "llama.cpp Q4_1"]
        arguments.threads, arguments.batch, arguments.prompt = [os.cpu_count() or 1], [1], [128]
        arguments.starts = False
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """Write what a run would write before it measures."""
    if arguments.bars:
        pairs = [(model, one) for model, variants, _ in BARS for one in variants_of(model, variants)]
    else:
        pairs = [(model, one) for model in arguments.models for one in variants_of(model, arguments.variants)]
    for model, variant in pairs:
        print(prepared(model, variant), flush=True)


def variants_of(model: str, variants: Sequence[str]) -> list[str]:
    """Return those of the variants that a model has, and that are installed: Q4_1 is the source of SmolLM2."""
    return [
        one
        for one in variants
        if not one.startswith("llama.cpp")
        or (laptop_llama.installed() and (one != "llama.cpp Q4_1" or model == SMOLLM))
    ]


def measure(cases: Sequence[Case], variants: Sequence[str], rounds: int) -> None:
    """Run all cases of one model; rows that are there are not measured again."""
    variants = variants_of(cases[0].model, variants)
    existing = read_rows()
    wanting = [case for case in cases if any(len(rows_of(existing, case, one)) < rounds for one in variants)]
    for threads, group in itertools.groupby(wanting, lambda case: case.threads):
        paths = {one: prepared(cases[0].model, one) for one in variants}
        for case in group:
            # What compiles stays large: the memory of the next process is that of later uses.
            with Processes(case.model, paths, threads) as processes:
                there = warmed_up(processes, case, paths)
            with Processes(case.model, there, threads) as processes:
                measure_case(processes, case, warmed_up(processes, case, there), rounds)


def request_of(case: Case) -> dict[str, int]:
    return {"batch": case.batch, "prompt": case.prompt, "new": NEW}


def warmed_up(processes: Processes, case: Case, paths: Mapping[str, Any]) -> dict[str, Any]:
    """Run all variants once, which compiles or reads what is not in memory yet; return those that did."""
    there = {}
    for variant, path in paths.items():
        try:
            processes.run(variant, request_of(case))
            there[variant] = path
        except StoppedError as error:
            print(f"    left out: {error}", flush=True)
    return there


def measure_case(processes: Processes, case: Case, paths: Mapping[str, Any], rounds: int) -> None:
    print(f"\n{case.model}, {case.threads} threads, batch {case.batch}, prompt {case.prompt}", flush=True)
    for turn in range(rounds if paths else 0):
        for variant in rotated(list(paths), turn):
            done = processes.run(variant, request_of(case))
            row = {**case._asdict(), "variant": variant, "commit": commit()}
            row["prefill_per_s"] = case.batch * case.prompt / done["prefill_s"]
            row["decode_per_s"] = case.batch * (NEW - 1) / done["decode_s"]
            row |= {"resident_mb": done["resident_mb"], "weights_mb": megabytes(paths[variant])}
            add_row(row)
            rates = f"prefill {row['prefill_per_s']:8.1f}/s   decode {row['decode_per_s']:7.1f}/s"
            print(f"    {variant:18} {rates}   {done['resident_mb']:6.0f} MB", flush=True)


def measure_starts(model: str, variants: Sequence[str], threads: int) -> None:
    """Measure the time from the start of a process to its first token: with empty caches, and again."""
    existing = read_rows()
    case = Case(model, threads, 1, 0)
    for variant in variants:
        if rows_of(existing, case, variant):
            continue
        cold, warm = first_token_seconds(model, variant, prepared(model, variant), threads)
        add_row({**case._asdict(), "variant": variant, "commit": commit(), "cold_s": cold, "warm_s": warm})
        print(
            f"    {model}, {variant}: first token after {cold:.1f} s, the second time {warm:.1f} s",
            flush=True,
        )


def rotated(values: list[str], turn: int) -> list[str]:
    """Return the values, another one first in every round."""
    place = turn % len(values)
    return values[place:] + values[:place]


def add_row(row: dict[str, Any]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows() -> list[dict[str, Any]]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half a line


def rows_of(rows: Sequence[dict[str, Any]], case: Case, variant: str) -> list[dict[str, Any]]:
    return [
        row for row in rows if row["variant"] == variant and Case(*(row[key] for key in Case._fields)) == case
    ]


MEASURES = ("prefill_per_s", "decode_per_s", "resident_mb", "weights_mb", "cold_s", "warm_s")


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for every case and variant, with the medians of its rounds."""
    return list(_medians(rows))


def _medians(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    keys = dict.fromkeys((Case(*(row[key] for key in Case._fields)), row["variant"]) for row in rows)
    for case, variant in keys:
        same = rows_of(rows, case, variant)
        values = {
            measure: round(statistics.median(row[measure] for row in same), 2) if measure in same[0] else ""
            for measure in MEASURES
        }
        # Rows of several runs add up: each says of which it is.
        of = {"commit": same[-1]["commit"]}
        yield {**case._asdict(), "variant": variant, "rounds": len(same), **values, **of}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    names = ("model", "threads", "batch", "prompt", "variant", *MEASURES)
    print("\n" + "  ".join(f"{name:>13}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]!s:>13.18}" for name in names))


if __name__ == "__main__":
    main()
