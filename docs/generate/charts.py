"""Charts as inline SVG: no script, no fonts from elsewhere, colours of the page's own style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
BAR, GAP, LABEL = 18, 5, 180

Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], x_label: str, y_label: str, log: bool = False) -> str:
    """Return a chart of lines with a mark at every point; a series of one point is a mark alone.

    Args:
        series: name to points (x, y).
        x_label: under the axis.
        y_label: above the axis.
        log: whether the vertical axis is logarithmic.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _powers(min(ys), max(ys)) if log else _ticks(min(0.0, *ys), max(ys))
    scale = math.log10 if log else float

    def place(x: float, y: float) -> tuple[float, float]:
        low, high = scale(y_ticks[0]), scale(y_ticks[-1])
        right = LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(
            f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{x_label}</text>'
    )
    for index, (name, points) in enumerate(series.items()):
        placed = [place(x, y) for x, y in sorted(points)]
        path = "M" + "L".join(f"{x} {y}" for x, y in placed)
        parts.append(f'<path class="line s{index}" d="{path}"/>')
        for (x, y), (bits, value) in zip(placed, sorted(points), strict=True):
            title = f"<title>{escape(name)}: {bits:g}, {value:g}</title>"
            parts.append(f'<circle class="dot s{index}" cx="{x}" cy="{y}" r="3.5">{title}</circle>')
    body = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return _figure(f"{escape(y_label)}", body, list(series))


def bars(rows: Mapping[str, float], label: str, marked: Sequence[str] = ()) -> str:
    """Return horizontal bars, each with its figure.

    Args:
        rows: name to value, 0 or more.
        label: what the values are, with their unit.
        marked: names whose bars stand out.
    """
    most = max(rows.values())
    room = WIDTH - LABEL - 60
    parts = []
    for index, (name, value) in enumerate(rows.items()):
        y = index * (BAR + GAP)
        kind = "s0" if name in marked else "s9"
        width = max(1.0, round(value / most * room, 1))
        parts.append(
            f'<text class="tick" x="{LABEL - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar {kind}" x="{LABEL}" y="{y}" width="{width}" height="{BAR}"/>'
            f'<text class="tick" x="{LABEL + width + 5}" y="{y + 13}">{value:g}</text>'
        )
    height = len(rows) * (BAR + GAP)
    body = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    return _figure(escape(label), body, [])


def _figure(caption: str, body: str, names: Sequence[str]) -> str:
    legend = "".join(
        f'<span><i class="key s{index}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    legend = f'<div class="legend">{legend}</div>' if legend else ""
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{legend}{body}</figure>'


def _ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers that enclose a range."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten that enclose a range."""
    known = [factor * 10.0**power for power in range(-8, 8) for factor in (1, 2, 5)]
    first = max(index for index, value in enumerate(known) if value <= low)
    last = min(index for index, value in enumerate(known) if value >= high)
    return [float(f"{value:g}") for value in known[first : last + 1]]
