"""What to finetune with: KL by kind of text after finetuning with one kind, with half the model's own text, or with that alone.

    python benchmarks/finetune_text.py [--seeds 0 1]

stories260K, which knows children's stories alone, compressed once to 2 bits with its own text, then finetuned with 40 thousand
tokens; judged as in mixture.py. Rows are appended to benchmarks/results/finetune_text.csv as they come; those that are there are
left out. A row takes 30 seconds of one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixture import KINDS, SHARED, TABLE, fill, texts

import dbf_compile

DENSE = SHARED / "models" / "stories260K"
WINDOW: dict[str, Any] = {"length": 256, "progress": False}
# The defaults serve real models; one that is so small learns more with larger rates.
RATES = {"sign_rate": 1.0, "scale_rate": 0.01, "norm_rate": 0.001}


def rows(seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what is to be measured: data, share of own text, seed; first the folder before finetuning."""
    yield {"data": "before", "own_text": 0.0, "seed": 0}
    for seed in seeds:
        for data in ("encyclopedia", "stories"):
            for share in (0.0, 0.5):
                yield {"data": data, "own_text": share, "seed": seed}
        yield {"data": "none", "own_text": 1.0, "seed": seed}


def main() -> None:
    """Measure what is not in the table yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    train, held_out = texts()
    with tempfile.TemporaryDirectory() as place:
        start = Path(place) / "start"
        dbf_compile.compress(DENSE, start, bits=2.0, mode="independent", windows=32, **WINDOW)

        def measure(row: dict[str, Any]) -> dict[str, float]:
            folder = start
            if row["data"] != "before":
                data = {row["data"]: train[row["data"]]} if row["data"] in train else None
                output = Path(place) / "-".join(map(str, row.values()))
                options = {"own_text": row["own_text"], "seed": row["seed"], "tokens": 40_000}
                folder = dbf_compile.finetune(start, data, output, **WINDOW, **RATES, **options).folder
            judged = dbf_compile.evaluate(folder, held_out, dense=DENSE, windows=12, **WINDOW)
            return {kind: judged["kinds"][kind]["kl"] for kind in KINDS}

        fill(TABLE.with_name("finetune_text.csv"), rows(parser.parse_args().seeds), measure)


if __name__ == "__main__":
    main()
