"""The charts of the report's page: what the template draws, in units of the SVG.

A block is a column, its layers stand side by side in it, and values count from zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from statistics import fmean, median
from typing import Any

from dbf_compile.run.report import Report, StageRow

_LEFT, _RIGHT, _TOP, _HEIGHT = 40, 8, 12, 170

# One shape for each kind of layer, around a point; the last is what all further kinds share.
MARKS = (
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
class Chart:
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
        """The transform that makes marks smaller; empty at full size."""
        return f"scale({self.size})" if self.size < 1 else ""


def _chart(title: str, style: str, note: str, points: Sequence[_Point], rule: float | None = None) -> Chart:
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
    return Chart(
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
            (series, " ".join(f"{_mean(at, 0):.1f},{_mean(at, 1):.1f}" for at in columns.values()))
            for series, columns in lines.items()
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


def series_of(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the series of every layer and the names of the series; those without a mark of their own share the last."""
    kinds = _kinds(names)
    distinct = list(dict.fromkeys(kinds))
    last = len(MARKS) - 1
    series = {kind: min(index, last) for index, kind in enumerate(distinct)}
    names = distinct if len(distinct) <= last + 1 else [*distinct[:last], "others"]
    return [series[kind] for kind in kinds], names


def _kinds(names: Sequence[str]) -> list[str]:
    """Return what each layer is in its block, such as "q + k + v": the shortest endings that tell all kinds apart."""
    paths = {name: [_path_in_block(part) for part in name.split(" + ")] for name in names}
    endings = Counter(
        path[-length:]
        for path in {path for parts in paths.values() for path in parts}
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


def layer_charts(report: Report, series: Sequence[int]) -> list[Chart]:
    """Return the charts of bits and, where they were measured, of errors of all layers."""
    layers = list(zip(report.layers, series, strict=True))

    def points(field: str) -> list[_Point]:
        return [
            _Point(layer.block, own, layer[field], f"{short_name(layer.name)}: {layer[field]:.4g}")
            for layer, own in layers
            if layer[field] is not None
        ]

    def note(field: str, digits: str) -> str:
        values = [(layer[field], layer.name) for layer, _ in layers if layer[field] is not None]
        (low, _), (high, where) = min(values), max(values)
        spread = f"from {low:{digits}} to {high:{digits}} in {short_name(where)}."
        middle = f"Median {median(value for value, _ in values):{digits}}, "
        return middle + (spread if low < high else "the same in all layers.")

    target = report.bits.target
    bits = note("bits_per_weight", ".2f") + ("" if target is None else f" Dashed: the target, {target:.4g}.")
    style = "bars" if len(layers) <= 256 else "dots"  # bars of a pixel each would blur
    charts = [_chart("Bits per weight", style, bits, points("bits_per_weight"), target)]
    if errors := points("error"):
        charts.append(_chart("Error", "dots", note("error", ".3g"), errors))
    return charts


def stage_gains(stages: Sequence[StageRow]) -> list[dict[str, Any]]:
    """Return a summary of every stage over its blocks, and a chart where there is more than one."""
    grouped: dict[tuple[str, str | None], list[StageRow]] = {}
    for stage in stages:
        grouped.setdefault((stage.stage, stage.measure), []).append(stage)
    gains = []
    for (name, measure), rows in grouped.items():
        points = [
            _Point(
                row.block,
                0,
                row.after,
                f"block {row['block']}: {row['before']:.4g} → {row['after']:.4g}",
                row.before,
            )
            for row in rows
            if row.block is not None
        ]
        seconds = [row.seconds for row in rows if row.seconds is not None]
        gains.append(
            {
                "stage": name,
                "measure": measure,
                "rows": rows,
                "blocks": len(points),
                "before": fmean(row.before for row in rows),
                "after": fmean(row.after for row in rows),
                "seconds": sum(seconds) if seconds else None,
                "chart": _chart(name, "moves", measure or "", points) if len(points) > 1 else None,
            }
        )
    return gains


def short_name(name: str) -> str:
    """Return the names of a merged layer, the folders that they share in the first alone."""
    first, *others = (part.split(".") for part in name.split(" + "))
    alike = takewhile(lambda words: len(set(words)) == 1, zip(first, *others, strict=False))
    shared = sum(1 for _ in alike)
    return " + ".join([".".join(first), *(".".join(part[shared:]) or ".".join(part) for part in others)])
