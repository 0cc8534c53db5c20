"""One compression of a model as a page: the content of ``dbf_report.json``, drawn as one HTML file.

The page runs no script and fetches nothing. Its words and its looks are ``page.html.jinja`` beside this file; its charts are
worked out in :mod:`dbf_compile.run.charts`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dbf_compile.compression.operations import Operations, dense_operations, factored_operations
from dbf_compile.errors import CheckpointError
from dbf_compile.files import atomic_write, write_text
from dbf_compile.run.charts import MARKS, layer_charts, series_of, short_name, stage_gains
from dbf_compile.run.report import (
    PAGE,
    REPORT,
    Bits,
    Coverage,
    DataFacts,
    Evaluation,
    LayerRow,
    OperationCounts,
    OperationFacts,
    Report,
    one_kind_note,
)


def write_report(report: Report | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of a report to a file, which appears whole or not at all and replaces what was there.

    Args:
        report: a report, or the content of ``dbf_report.json``.
        path: the file; its folder exists.

    Raises:
        CheckpointError: the report is damaged, or the file cannot be written.
    """
    path, page = Path(path), report_html(report)
    try:
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold halves of characters
    except OSError as error:
        raise CheckpointError(
            f"writing {path} failed ({error})",
            "a path in an existing, writable folder",
            "choose another path",
        ) from error


def update_evaluation(folder: Path, report: Report, measured: Mapping[str, Any]) -> None:
    """Replace the evaluation in the report of a compressed folder, and draw its page anew.

    Args:
        folder: where report and page lie.
        report: as it is there.
        measured: as :func:`~dbf_compile.calibration.compare.compare` or ``compare_kinds`` gives it; other keys are left out.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    report = replace(report, evaluation=Evaluation.of(measured))
    write_report(report, folder / PAGE)
    write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")


def report_html(report: Report | Mapping[str, Any]) -> str:
    """Return the page of a report; sections that the report lacks are left out.

    Raises:
        CheckpointError: a field is missing or of the wrong type.
    """
    if not isinstance(report, Report):
        report = Report.parse(report)
    series, kinds = series_of([layer.name for layer in report.layers])
    page: str = _template().render(
        **vars(report),
        series=series,
        kinds=kinds,
        marks=MARKS,
        charts=layer_charts(report, series),
        gains=stage_gains(report.stages or ()),
        coverage_parts=report.coverage and _coverage_parts(report.coverage),
        file_parts=report.coverage and _file_parts(report.coverage, report.bits),
        operation_rows=report.operations and _operation_rows(report.operations),
        layer_operations=_layer_operations(report.layers),
        quality=_quality_rows(report.evaluation, report.data),
        one_kind=report.data and report.data.one_kind and one_kind_note(report.data.one_kind),
        time_parts=report.time and _time_parts(report.time),
    )
    return page


_Part = tuple[str, float, str, int]  # of a whole: its name, its share, what to write beside it, its colour


def _coverage_parts(coverage: Coverage) -> list[_Part]:
    """Return the shares of all weights: the factored one, then the dense ones by reason, then what no one accounts for."""
    dense: dict[str, float] = {}
    for row in coverage.dense or ():
        reason = row.reason or "dense"
        dense[reason] = dense.get(reason, 0.0) + (row.share or 0.0)
    parts = [("factored", coverage.share), *sorted(dense.items(), key=lambda part: -part[1])]
    return _parts(parts, 1.0, "other dense weights", _percent)


def _file_parts(coverage: Coverage, bits: Bits) -> list[_Part]:
    """Return the shares of the file; none where its size is unknown or does not fit to the shares of weights."""
    factored = coverage.share * bits.factored
    if bits.file is None or not factored < bits.file:
        return []
    return _parts([("factored", factored / bits.file)], 1.0, "everything else", _percent)


# What stands in the table of kinds of text: the figure, what to write before it, and how.
_QUALITY: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("KL divergence from the dense model", "{:.3g}".format),
    "nats_lost": ("nats a token lost", "{:.3g}".format),
    "top1_agreement": ("same first choice", lambda share: _percent(share)),
    "dense": ("nats a token, dense", "{:.4g}".format),
    "compressed": ("nats a token, compressed", "{:.4g}".format),
    "error": ("error of the output", "{:.3g}".format),
}


def _quality_rows(evaluation: Evaluation | None, data: DataFacts | None) -> list[list[str]]:
    """Return a head and the rows of the table of kinds of text, a column a kind; empty if no kinds were told apart."""
    if evaluation is None or not evaluation.kinds:
        return []
    kinds = evaluation.kinds
    columns = [*kinds.values(), evaluation]
    rows = [
        [title, *("–" if column.get(name) is None else text(column[name]) for column in columns)]
        for name, (title, text) in _QUALITY.items()
        if any(column.get(name) is not None for column in columns)
    ]
    worst = evaluation.worst_kind if len(kinds) > 1 else None
    head = ["", *(f"{kind} (worst)" if kind == worst else kind for kind in kinds), "mean"]
    if data is not None and data.kinds:
        windows = [data.kinds[kind].windows if kind in data.kinds else 0 for kind in kinds]
        rows.append(["windows of the kind calibrated with", *map(_count, windows), _count(data.windows)])
    return [head, *rows]


def _operation_rows(facts: OperationFacts) -> list[tuple[str, OperationCounts]]:
    """Return what to write before the counts of each kind of layers; a kind that there is not is left out."""
    kinds = [
        ("factored", facts.factored),
        ("tables of quantized rows", facts.quantized),
        ("dense", facts.dense),
    ]
    every = [("all", facts.total), ("all, in the dense model", facts.dense_model)]
    return [(name, counts) for name, counts in kinds if counts and counts.multiplications] + every


def _layer_operations(layers: Sequence[LayerRow]) -> list[tuple[str, Operations, Operations]]:
    """Return name, operations and those when dense of the layers whose sizes the report has."""
    return [
        (layer.name, factored_operations(columns, layer.mid_features, rows), dense_operations(columns, rows))
        for layer in layers
        for rows, columns in [layer.shape if layer.shape and len(layer.shape) == 2 else (0, 0)]
        if layer.mid_features and rows and columns
    ]


def _time_parts(time: Mapping[str, float]) -> list[_Part]:
    parts = [(name, seconds) for name, seconds in time.items() if name != "total"]
    total = max(time.get("total", 0.0), sum(seconds for _, seconds in parts))
    if not parts or not total:
        return []
    return _parts(parts, total, "everything else", _duration)


def _parts(
    amounts: Sequence[tuple[str, float]], total: float, rest: str, text: Callable[[float], str]
) -> list[_Part]:
    """Return the parts of a whole; what is missing to the total is one more, in grey."""
    grey = len(MARKS) - 1
    parts = [
        (name, amount / total, text(amount), min(place, grey)) for place, (name, amount) in enumerate(amounts)
    ]
    missing = total - sum(amount for _, amount in amounts)
    return [*parts, (rest, missing / total, text(missing), grey)] if missing > 0.0005 * total else parts


# How the template writes numbers; None is a dash.


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return ("< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}").replace("%", "\u202f%")


def _change(after: float, before: float) -> str:
    return f"{after / before - 1:+.1%}".replace("%", "\u202f%").replace("-", "−") if before else "–"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "short": _short,
        "fixed": "{:.2f}".format,
        "count": _count,
        "percent": _percent,
        "change": _change,
        "duration": _duration,
        "size": _size,
        "setting": _setting,
        "short_name": short_name,
    }
    return pages.get_template("page.html.jinja")
