"""Tables of ``benchmarks/results/llm.csv``: what a language model loses, by kind of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from result_tables import RESULTS, Row, figure, markdown, read, source

_NOT_MEASURED = "Not measured yet."
# What tells two ways apart.
_WAY = ("method", "bits", "calibration", "seed", "calibrating", "tokens")


def llm(*targets: str) -> str:
    """Return a row for every way at some bits, least divergence first, with a column for every kind of text."""
    rows = [row for row in _rows("llm") if float(row["target"]) in map(float, targets)]
    if not rows:
        return _NOT_MEASURED
    columns = list(dict.fromkeys(row["kind"] for row in rows))
    ways: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        ways.setdefault(tuple(row[name] for name in _WAY), []).append(row)
    ordered = sorted(ways.values(), key=lambda own: (float(own[0]["target"]), _mean(own, "kl")))
    body = [_line(own, columns) for own in ordered]
    return markdown(["way", "bits", "calibrated with", "mean", "worst", *columns, "minutes"], body)


def _line(rows: Sequence[Row], columns: Iterable[str]) -> list[str]:
    first, cells = rows[0], {row["kind"]: row for row in rows}
    short = _short(rows)
    worst = max(short, key=lambda row: float(row["kl"]))
    return [
        _way(first),
        figure(first["bits"]),
        _calibration(first),
        f"**{_mean(rows, 'kl'):.3f}**, {_mean(rows, 'nats_lost'):.3f}",
        f"{float(worst['kl']):.3f} ({worst['kind']})",
        *(_cell(cells[kind]) if kind in cells else "–" for kind in columns),
        f"{float(first['seconds']) / 60:.1f}",
    ]


def _way(row: Row) -> str:
    return row["method"] + ("" if row["seed"] == "0" else f", seed {row['seed']}")


def _calibration(row: Row) -> str:
    """Return the text, its windows, and the tokens that were trained with after them."""
    if row["calibration"] == "none":
        return "–"
    trained = f", {int(row['tokens']) / 1e6:.3g} million tokens" if row["tokens"] != "0" else ""
    return f"{row['calibration']}, {row['calibrating']} windows{trained}"


def _cell(row: Row) -> str:
    return f"{float(row['kl']):.3f}, {float(row['nats_lost']):.3f}"


def _mean(rows: Sequence[Row], column: str) -> float:
    return fmean(float(row[column]) for row in _short(rows))


def _short(rows: Sequence[Row]) -> list[Row]:
    """Return the columns of usual windows: one for every kind of text."""
    return [row for row in rows if "," not in row["kind"]]


def llm_stages() -> str:
    """Return what each stage of our ways gained, and its minutes."""
    rows = _rows("llm_stages")
    if not rows:
        return _NOT_MEASURED
    head = ["way", "bits", "calibrated with", "stage", "measure", "before", "after", "minutes"]
    body = [
        [
            _way(row),
            figure(row["bits"]),
            _calibration(row),
            row["stage"],
            row["measure"] or "–",
            *(figure(row[column]) if row[column] else "–" for column in ("before", "after")),
            f"{float(row['seconds']) / 60:.1f}" if row["seconds"] else "–",
        ]
        for row in rows
    ]
    return markdown(head, body)


def _rows(name: str) -> list[Row]:
    return read(name) if (RESULTS / f"{name}.csv").exists() else []


def llm_source(name: str) -> str:
    """Return where the figures of a file come from; before there are any, the command that measures them."""
    return (
        source(name, "make bench-llm")
        if (RESULTS / f"{name}.csv").exists()
        else "\n<small>`make bench-llm`</small>"
    )


GENERATORS: dict[str, Callable[..., str]] = {"llm": llm, "llm_stages": llm_stages, "llm_source": llm_source}
