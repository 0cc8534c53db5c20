"""One compression of a model as a page: the content of ``dbf_report.json``, drawn as one HTML file.

The page runs no script and fetches nothing. Its words and its looks are ``page.html.jinja`` beside this file; here
the content is checked and the charts are worked out.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dbf_compile.errors import CheckpointError
from dbf_compile.files import appearing

_MAKE_AGAIN = "dbf_report.json is damaged: compress the model again"

_TEXT, _NUMBER = "text", "a finite number"
_COUNT, _AMOUNT = "a whole number of at least 0", "a finite number of at least 0"
# Comparisons, not math.isfinite: JSON knows whole numbers that no float can hold.
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    _TEXT: lambda value: isinstance(value, str),
    _NUMBER: lambda value: _is_number(value) and -1e300 < value < 1e300,
    _COUNT: lambda value: _is_number(value) and isinstance(value, int) and 0 <= value < 1e300,
    _AMOUNT: lambda value: _is_number(value) and 0 <= value < 1e300,
}

# What a report holds: a mapping of fields ("?": may be absent, null or empty; "*": any name), a list, or a value.
_REPORT: Mapping[str, Any] = {
    "dbf_compile": _TEXT,
    "created?": _TEXT,
    "model": {"name": _TEXT, "architecture?": _TEXT, "parameters?": _COUNT, "hash?": _TEXT},
    "data?": {"source?": _TEXT, "hash?": _TEXT, "windows?": _COUNT, "tokens?": _COUNT},
    "settings?": {"*": None},
    "bits": {"target?": _AMOUNT, "factored": _AMOUNT, "file?": _AMOUNT},
    "coverage?": {
        "share": _AMOUNT,
        "dense?": [{"name": _TEXT, "weights?": _COUNT, "share?": _AMOUNT, "reason?": _TEXT}],
    },
    "layers": [
        {
            "name": _TEXT,
            "shape?": [_COUNT],
            "mid_features?": _COUNT,
            "bits_per_weight": _AMOUNT,
            "error?": _AMOUNT,
            "seconds?": _AMOUNT,
            "block?": _COUNT,
        }
    ],
    "stages?": [
        {
            "stage": _TEXT,
            "block?": _COUNT,
            "measure?": _TEXT,
            "before": _AMOUNT,
            "after": _AMOUNT,
            "seconds?": _AMOUNT,
        }
    ],
    "evaluation?": {
        "measure?": _TEXT,
        "dense?": _NUMBER,
        "compressed?": _NUMBER,
        "kl?": _NUMBER,
        "top1_agreement?": _AMOUNT,
    },
    "time?": {"*": _AMOUNT},
    "memory?": {"peak_bytes": _COUNT},
    "machine?": {"*": None},
}


def write_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of a report to a file, which appears whole or not at all and replaces what was there.

    Args:
        report: the content of ``dbf_report.json``.
        path: the file; its folder exists.

    Raises:
        CheckpointError: the report is damaged, or the file cannot be written.
    """
    path, page = Path(path), report_html(report)
    try:
        with appearing(path) as partial:
            partial.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold halves of characters
    except OSError as error:
        raise CheckpointError(
            f"writing {path} failed ({error})",
            "a path in an existing, writable folder",
            "choose another path",
        ) from error


def report_html(report: Mapping[str, Any]) -> str:
    """Return the page of a report; sections that the report lacks are left out.

    Raises:
        CheckpointError: a field is missing or of the wrong type.
    """
    checked = _checked(report, _REPORT, "")
    if not checked["layers"]:
        raise CheckpointError("an empty list of layers", "one layer or more", _MAKE_AGAIN)
    series, kinds = _series([layer["name"] for layer in checked["layers"]])
    coverage, time = checked["coverage"], checked["time"]
    return _PAGES.get_template("page.html.jinja").render(
        **checked,
        series=series,
        kinds=kinds,
        marks=_MARKS,
        charts=_layer_charts(checked, series),
        gains=_gains(checked["stages"] or []),
        coverage_parts=coverage and _coverage_parts(coverage),
        file_parts=coverage and _file_parts(coverage, checked["bits"]),
        time_parts=time and _time_parts(time),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked(value: Any, wanted: Any, place: str) -> Any:
    """Return ``value`` with all fields of ``wanted``: None stands for those that may be absent and are."""
    if wanted is None:
        return value
    if isinstance(wanted, str):
        if not _CHECKS[wanted](value):
            raise _damaged(place, value, wanted)
        return value
    if isinstance(wanted, list):
        if not isinstance(value, (list, tuple)):
            raise _damaged(place, value, "a list")
        return [_checked(item, wanted[0], f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise _damaged(place, value, "a mapping")
    if "*" in wanted:
        return {str(name): _checked(item, wanted["*"], f"{place}.{name}") for name, item in value.items()}
    fields: dict[str, Any] = {}
    for field, kind in wanted.items():
        name = field.removesuffix("?")
        inside = f"{place}.{name}".lstrip(".")
        if name != field and value.get(name) in (None, {}, []):
            fields[name] = None
        elif name not in value:
            raise CheckpointError(f"no {inside!r}", "a report with all of its fields", _MAKE_AGAIN)
        else:
            fields[name] = _checked(value[name], kind, inside)
    return fields


def _damaged(place: str, value: object, allowed: str) -> CheckpointError:
    text = repr(value)
    return CheckpointError(
        f"{place or 'the report'} = {text if len(text) <= 80 else text[:77] + '...'}", allowed, _MAKE_AGAIN
    )


# Charts: a block is a column, its layers stand side by side in it, and values count from zero.

_LEFT, _RIGHT, _TOP, _HEIGHT = 40, 8, 12, 170

# One shape for each kind of layer, around a point; the last is what all further kinds share.
_MARKS = (
    "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "m-2.9-2.9h5.8v5.8h-5.8z",
    "m0-3.9 3.7 6.6h-7.4z",
    "m0-4.1 4.1 4.1-4.1 4.1-4.1-4.1z",
    "m0 3.9 3.7-6.6h-7.4z",
    "m-3.8 1.2v-2.4h2.6v-2.6h2.4v2.6h2.6v2.4h-2.6v2.6h-2.4v-2.6z",
    "m-1.6-3.8h3.2l2.2 3.8-2.2 3.8h-3.2l-2.2-3.8z",
    "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z",
)


@dataclass(frozen=True)
class _Point:
    block: int | None
    series: int
    value: float
    text: str
    origin: float = 0.0


@dataclass(frozen=True)
class _Chart:
    """What the template draws, in units of the SVG."""

    title: str
    style: str
    note: str
    width: float
    thickness: float  # of bars
    size: float  # of marks
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    marks: list[tuple[float, float, float, _Point]]
    lines: list[tuple[int, str]]
    rule: float | None

    left, right, top, height = _LEFT, _RIGHT, _TOP, _HEIGHT

    @property
    def shrink(self) -> str:
        return f"scale({self.size})" if self.size < 1 else ""


def _chart(title: str, style: str, note: str, points: Sequence[_Point], rule: float | None = None) -> _Chart:
    blocks: dict[int | None, list[_Point]] = {}
    for point in sorted(points, key=lambda point: math.inf if point.block is None else point.block):
        blocks.setdefault(point.block, []).append(point)
    abreast = max(map(len, blocks.values()))
    width = min(max(360, _LEFT + _RIGHT + 7 * len(blocks) * abreast), 900)
    column = (width - _LEFT - _RIGHT) / len(blocks)
    slot = column * (0.8 if abreast > 1 else 1.0) / abreast
    step, top = _scale(max(max(point.value, point.origin) for point in points), rule or 0.0)

    def across(index: int, place: float) -> float:
        return _LEFT + (index + 0.5) * column + place * slot

    def down(value: float) -> float:
        return _TOP + _HEIGHT * (1 - value / top)

    marks = [
        (across(index, place - (len(members) - 1) / 2), down(point.value), down(point.origin), point)
        for index, members in enumerate(blocks.values())
        for place, point in enumerate(members)
    ]
    lines: dict[int, dict[int | None, list[tuple[float, float]]]] = {}
    for x, y, _, point in marks:
        if point.block is not None:
            lines.setdefault(point.series, {}).setdefault(point.block, []).append((x, y))
    return _Chart(
        title,
        style,
        note,
        width,
        thickness=min(0.8 * slot, 16.0),
        size=round(min(max(0.45, min(slot / 1.8, column / 7)), 1.0), 2),
        ticks_x=[(across(index, 0), label) for index, label in _labels(list(blocks), column)],
        ticks_y=[(down(step * tick), f"{step * tick:.4g}") for tick in range(round(top / step) + 1)],
        marks=marks,
        lines=[
            (series, " ".join(f"{_mean(at, 0):.1f},{_mean(at, 1):.1f}" for at in found.values()))
            for series, found in lines.items()
        ],
        rule=None if rule is None else down(rule),
    )


def _mean(points: Sequence[tuple[float, float]], axis: int) -> float:
    return fmean(point[axis] for point in points)


def _scale(*values: float) -> tuple[float, float]:
    """Return the distance of ticks and the last of them: at most five above zero, at round numbers."""
    most = max(values)
    if most < 1e-12:
        return 0.5, 1.0
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor * 5 >= most)
    return step, step * math.ceil(most / step * (1 - 1e-9))


def _labels(blocks: Sequence[int | None], column: float) -> list[tuple[int, str]]:
    """Return where which block is named, with 26 units or more from one name to the next."""
    steps = (factor * 10**power for power in count() for factor in (1, 2, 5))
    step = next(step for step in steps if step * column >= 26)
    numbered = [index for index, block in enumerate(blocks) if block is not None]
    shown = [(index, str(blocks[index])) for index in numbered if index % step == 0]
    if len(numbered) == len(blocks):
        return shown
    return [label for label in shown if len(blocks) - 1 - label[0] >= step] + [(len(blocks) - 1, "rest")]


def _series(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the series of every layer and the names of the series; those without a mark of their own share the last."""
    kinds = _kinds(names)
    found = list(dict.fromkeys(kinds))
    last = len(_MARKS) - 1
    series = {kind: min(index, last) for index, kind in enumerate(found)}
    return [series[kind] for kind in kinds], found if len(found) <= last + 1 else [*found[:last], "others"]


def _kinds(names: Sequence[str]) -> list[str]:
    """Return what each layer is in its block, such as "q + k + v": the shortest endings that tell all kinds apart."""
    paths = {name: [_path_in_block(part) for part in name.split(" + ")] for name in names}
    endings = Counter(
        path[-length:]
        for path in {path for found in paths.values() for path in found}
        for length in range(1, len(path) + 1)
    )

    def ending(path: tuple[str, ...]) -> str:
        length = next((n for n in range(1, len(path)) if endings[path[-n:]] == 1), len(path))
        return ".".join(path[-length:]) if length > 1 else path[-1].removesuffix("_proj")

    return [" + ".join(map(ending, paths[name])) for name in names]


def _path_in_block(name: str) -> tuple[str, ...]:
    """Return the words after the number of the block; later numbers, of experts, are left out."""
    words = name.split(".")
    block = next((index for index, word in enumerate(words) if word.isdigit()), -1)
    return tuple(word for word in words[block + 1 :] if not word.isdigit()) or (name,)


def _layer_charts(report: Mapping[str, Any], series: Sequence[int]) -> list[_Chart]:
    layers = list(zip(report["layers"], series, strict=True))

    def points(field: str) -> list[_Point]:
        return [
            _Point(layer["block"], own, layer[field], f"{_short_name(layer['name'])}: {layer[field]:.4g}")
            for layer, own in layers
            if layer[field] is not None
        ]

    def note(field: str, digits: str) -> str:
        found = [(layer[field], layer["name"]) for layer, _ in layers if layer[field] is not None]
        (low, _), (high, where) = min(found), max(found)
        spread = f"from {low:{digits}} to {high:{digits}} in {_short_name(where)}."
        middle = f"Median {median(value for value, _ in found):{digits}}, "
        return middle + (spread if low < high else "the same in all layers.")

    target = report["bits"]["target"]
    bits = note("bits_per_weight", ".2f") + ("" if target is None else f" Dashed: the target, {target:.4g}.")
    style = "bars" if len(layers) <= 256 else "dots"  # bars of a pixel each would blur
    charts = [_chart("Bits per weight", style, bits, points("bits_per_weight"), target)]
    if errors := points("error"):
        charts.append(_chart("Error", "dots", note("error", ".3g"), errors))
    return charts


def _gains(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a summary of every stage over its blocks, and a chart where there is more than one."""
    grouped: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for stage in stages:
        grouped.setdefault((stage["stage"], stage["measure"]), []).append(stage)
    gains = []
    for (name, measure), rows in grouped.items():
        points = [
            _Point(
                row["block"],
                0,
                row["after"],
                f"block {row['block']}: {row['before']:.4g} → {row['after']:.4g}",
                row["before"],
            )
            for row in rows
            if row["block"] is not None
        ]
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        gains.append(
            {
                "stage": name,
                "measure": measure,
                "rows": rows,
                "blocks": len(points),
                "before": fmean(row["before"] for row in rows),
                "after": fmean(row["after"] for row in rows),
                "seconds": sum(seconds) if seconds else None,
                "chart": _chart(name, "moves", measure or "", points) if len(points) > 1 else None,
            }
        )
    return gains


_Part = tuple[str, float, str, int]  # of a whole: its name, its share, what to write beside it, its colour


def _coverage_parts(coverage: Mapping[str, Any]) -> list[_Part]:
    """Return the shares of all weights: the factored one, then the dense ones by reason, then what no one accounts for."""
    dense: dict[str, float] = {}
    for tensor in coverage["dense"] or []:
        reason = tensor["reason"] or "dense"
        dense[reason] = dense.get(reason, 0.0) + (tensor["share"] or 0.0)
    parts = [("factored", coverage["share"]), *sorted(dense.items(), key=lambda part: -part[1])]
    return _parts(parts, 1.0, "other dense weights", _percent)


def _file_parts(coverage: Mapping[str, Any], bits: Mapping[str, Any]) -> list[_Part]:
    """Return the shares of the file; none where its size is unknown or does not fit to the shares of weights."""
    factored = coverage["share"] * bits["factored"]
    if bits["file"] is None or not factored < bits["file"]:
        return []
    return _parts([("factored", factored / bits["file"])], 1.0, "everything else", _percent)


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
    grey = len(_MARKS) - 1
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


def _short_name(name: str) -> str:
    """Return the names of a merged layer, the folders that they share in the first alone."""
    first, *others = (part.split(".") for part in name.split(" + "))
    alike = takewhile(lambda words: len(set(words)) == 1, zip(first, *others, strict=False))
    shared = sum(1 for _ in alike)
    return " + ".join([".".join(first), *(".".join(part[shared:]) or ".".join(part) for part in others)])


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {
    "short": _short,
    "fixed": "{:.2f}".format,
    "count": _count,
    "percent": _percent,
    "change": _change,
    "duration": _duration,
    "size": _size,
    "setting": _setting,
    "short_name": _short_name,
}
