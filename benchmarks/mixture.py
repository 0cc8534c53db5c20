"""How large a share of the text to calibrate with a model should write itself: KL by kind of text, for every share.

    python benchmarks/mixture.py [--seeds 0 1] [--shares 0 0.25 0.5 0.75]

stories260K, which knows children's stories alone, at 2 bits, 32 windows of 256 of WikiText-2 or of TinyStories, whose place its own
text takes; judged on 12 windows of each kind that nothing was calibrated with. Rows are appended to
benchmarks/results/mixture.csv as they come; those that are there are left out. A row takes 45 seconds of one core.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from measure import provenance

import dbf_compile

SHARED = Path(__file__).parents[2] / "shared" / "data"
TABLE = Path(__file__).parent / "results" / "mixture.csv"
KINDS = ("stories", "web", "encyclopedia")
COLUMNS = ("data", "own_text", "seed", *KINDS, "mean", "worst")
SETTINGS: dict[str, Any] = {
    "bits": 2.0,
    "iterations": 40,
    "tune": 2,
    "refine": 2,
    "distill": 4,
    "progress": False,
}


def texts() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the text to calibrate with, and that to judge with, by kind."""
    stories, wiki, web = (
        (SHARED / "text" / f"{name}.txt").read_text()
        for name in ("tinystories-valid-a", "wikitext2-valid", "web-sample")
    )
    train = {"stories": [stories[: len(stories) // 2]], "encyclopedia": [wiki[: len(wiki) // 2]]}
    held_out = {
        "stories": [stories[len(stories) // 2 :]],
        "web": [web[:200_000]],
        "encyclopedia": [wiki[len(wiki) * 2 // 3 :]],
    }
    return train, held_out


def divergences(
    data: list[str] | None, held_out: dict[str, list[str]], share: float, seed: int
) -> dict[str, float]:
    """Return KL from the dense model on every kind."""
    dense = SHARED / "models" / "stories260K"
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "compressed"
        options = {"data": data, "own_text": share, "seed": seed, "windows": 32, "length": 256}
        dbf_compile.compress(dense, output, **SETTINGS, **options)
        judged = dbf_compile.evaluate(output, held_out, dense=dense, windows=12, length=256, progress=False)
    return {kind: judged["kinds"][kind]["kl"] for kind in KINDS}


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is to be measured: data, share of own text, seed."""
    for seed in arguments.seeds:
        for data in ("encyclopedia", "stories"):
            for share in arguments.shares:
                yield {"data": data, "own_text": float(share), "seed": seed}
        yield {"data": "none", "own_text": 1.0, "seed": seed}


def fill(
    path: Path, rows: Iterable[dict[str, Any]], measure: Callable[[dict[str, Any]], dict[str, float]]
) -> None:
    """Append to a table what is not there yet: KL by kind, its mean and the worst, of rows of data, share and seed."""
    there = list(csv.DictReader(path.open())) if path.exists() else []
    known = {(row["data"], float(row["own_text"]), int(row["seed"])) for row in there}
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *provenance()])
        if not there:
            table.writeheader()
        for row in rows:
            if (row["data"], row["own_text"], row["seed"]) in known:
                continue
            lost = measure(row)
            lost |= {"mean": fmean(lost.values()), "worst": max(lost.values())}
            table.writerow(row | {name: f"{value:.4f}" for name, value in lost.items()} | provenance())
            file.flush()
            print(row, lost, flush=True)


def main() -> None:
    """Measure what is not in the table yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    train, held_out = texts()
    fill(
        TABLE,
        rows(parser.parse_args()),
        lambda row: divergences(train.get(row["data"]), held_out, row["own_text"], row["seed"]),
    )


if __name__ == "__main__":
    main()
