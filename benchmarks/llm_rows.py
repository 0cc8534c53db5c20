"""Rows of bench_llm: what each one is, and what is kept of it, so that a run that was killed goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import provenance, write_results

from dbf_compile.files import write_text

WINDOWS = 64  # to calibrate with, as by default
# Minutes on two idle cores, judging apart; only the time left is guessed by them.
MINUTES = {
    "independent": 12,
    "sequential": 40,
    "AutoRound": 60,
    "GPTQ": 8,
    "GLQ E8": 30,
    "GLQ trellis": 240,
    "HQQ": 2,
}
JUDGING = 5  # minutes
TOKENS_A_MINUTE = 18_000  # end to end


@dataclass(frozen=True)
class Row:
    """One model to quantize and to judge.

    Args:
        method: "independent", "sequential", "end to end", or the name of a peer.
        bits: asked for.
        calibration: name of a text; "none" for what reads none.
        seed: of ours, where random starts matter.
        calibrating: windows of the text, to calibrate with; 0 for what reads none.
        tokens: to train with, end to end.
    """

    method: str
    bits: float
    calibration: str
    seed: int = 0
    calibrating: int = WINDOWS
    tokens: int = 0

    @property
    def name(self) -> str:
        """What the row is called on the command line, and its files."""
        words = [f"{self.bits:g}", self.method, self.calibration, str(self.seed)]
        words += [f"{self.calibrating} windows"] if self.calibrating not in (0, WINDOWS) else []
        words += [f"{self.tokens} tokens"] if self.tokens else []
        return "-".join("_".join(word.split()) for word in words)

    @property
    def minutes(self) -> float:
        if self.tokens:
            return self.tokens / TOKENS_A_MINUTE + JUDGING
        return MINUTES.get(self.method, 1) * max(self.calibrating / WINDOWS, 1) + JUDGING


class Store:
    """Results of rows, a file each; a file is there as a whole or not at all.

    Args:
        folder: where they lie.
        setting: what all rows depend on. Results of another setting are not taken for theirs.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        self.folder, self._setting = folder, json.loads(json.dumps(setting))
        (folder / "rows").mkdir(parents=True, exist_ok=True)

    def path(self, row: Row) -> Path:
        return self.folder / "rows" / f"{row.name}.json"

    def has(self, row: Row) -> bool:
        return self.path(row).exists() and self._is_ours(json.loads(self.path(row).read_text()))

    def add(self, row: Row, result: Mapping[str, Any]) -> None:
        """Keep the result of a row, with where it comes from."""
        content = {**asdict(row), **result, "setting": self._setting, "provenance": provenance()}
        write_text(self.path(row), json.dumps(content, indent=1) + "\n")

    def _is_ours(self, content: Mapping[str, Any]) -> bool:
        return bool(content["setting"] == self._setting)

    def results(self) -> list[dict[str, Any]]:
        """Return all results of this setting, least bits first."""
        contents = [json.loads(path.read_text()) for path in (self.folder / "rows").glob("*.json")]
        results = [content for content in contents if self._is_ours(content)]
        keys = ("bits", "calibration", "method", "seed", "calibrating", "tokens")
        return sorted(results, key=lambda one: [one[key] for key in keys])

    def write(self, model: str) -> list[Path]:
        """Write ``results/llm.csv``, a line for every row and kind of text, and ``results/llm_stages.csv``."""
        results = self.results()
        tables = {
            "llm": [line for one in results for line in _quality_lines(model, one)],
            "llm_stages": [line for one in results for line in _stage_lines(model, one)],
        }
        return [write_results(name, lines) for name, lines in tables.items() if lines]


def in_turn(rows: Sequence[Row], store: Store) -> Iterator[Row]:
    """Yield the rows that have no result yet, and say before each how much time is left."""
    waiting = [row for row in rows if not store.has(row)]
    print(f"{len(rows) - len(waiting)} of {len(rows)} rows are there already", flush=True)
    spent = guessed = 0.0
    for number, row in enumerate(waiting):
        # Once rows are done, this machine's own pace replaces that of the table.
        pace = spent / guessed if guessed else 60.0
        here, left = row.minutes * pace, sum(one.minutes for one in waiting[number:]) * pace
        print(
            f"[{number + 1}/{len(waiting)}] {row.name}: about {duration(here)}, all rows {duration(left)}",
            flush=True,
        )
        began = time.monotonic()
        yield row
        seconds = time.monotonic() - began
        spent, guessed = spent + seconds, guessed + row.minutes
        print(f"    {duration(seconds)}", flush=True)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _place(model: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "method": result["method"],
        "target": result["bits"],
        "bits": round(result["stored_bits"], 4),
        "calibration": result["calibration"],
        "seed": result["seed"],
        "calibrating": result["calibrating"],
        "tokens": result["tokens"],
    }


def _quality_lines(model: str, result: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for kind, figures in result["kinds"].items():
        yield {
            **_place(model, result),
            "kind": kind,
            "length": figures["length"],
            "windows": figures["windows"],
            **{name: round(figures[name], 4) for name in ("kl", "nats_lost", "top1_agreement", "compressed")},
            "seconds": round(result["seconds"], 1),
            **result["provenance"],
        }


def _stage_lines(model: str, result: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for stage in result.get("stages", ()):
        yield {**_place(model, result), **stage, **result["provenance"]}
