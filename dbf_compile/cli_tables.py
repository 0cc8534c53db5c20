"""Tables of figures that the command line prints: quality by kind of text, operations of a token, and the energy of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dbf_compile.run.report import one_kind_note

_OPERATIONS = ("additions", "lookups", "lookup_additions", "multiplications")
_KINDS = {
    "factored": "factored",
    "quantized": "tables of rows",
    "dense": "dense",
    "total": "all",
    "dense_model": "all, in the dense model",
}
LAYER_HEAD = f"{'additions':>13} {'look-ups':>13} {'multiplic.':>13} {'dense':>13}"


def evaluation_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what an evaluation found, a figure a line; figures of several kinds of text in a column each.

    Args:
        results: as :func:`dbf_compile.evaluation.evaluate` gives them.
    """
    kinds = results.get("kinds", {})
    columns = {**kinds, "mean": results, "worst": kinds[results["worst_kind"]]} if len(kinds) > 1 else {}
    table = [_row("", columns)] if columns else []
    lines = []
    for name, value in results.items():
        if columns and name != "measure" and all(name in figures for figures in columns.values()):
            table.append(_row(name, (_figure(figures[name]) for figures in columns.values())))
        elif name not in ("kinds", "calibrated_with_one_kind"):
            lines.append(f"{name:>16}  {_figure(value)}")
    note = results.get("calibrated_with_one_kind")
    return [*table, *lines, *([] if note is None else [one_kind_note(note)])]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:>16}  " + " ".join(f"{cell:>12}" for cell in cells)


def operation_lines(operations: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what a token costs.

    Args:
        operations: as :func:`dbf_compile.inspection.inspect` gives them.
    """
    titles = ("additions", "as look-ups", "and additions", "multiplications")
    lines = [" ".join([f"{'a token, in its layers':25}", *(f"{title:>17}" for title in titles)])]
    for kind, name in _KINDS.items():
        counts = operations[kind]
        if counts["multiplications"]:
            lines.append(" ".join([f"  {name:23}", *(f"{counts[each]:17,}" for each in _OPERATIONS)]))
    lines += [f"  experts that it reaches: {text}" for text in operations["experts"]]
    if operations["uncounted_weights"]:
        lines.append(f"  not counted: {operations['uncounted_weights']:,} weights of other modules")
    return [
        *lines,
        "  attention, norms and activation functions are left out: they are those of the dense model",
    ]


def energy_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines that say what a new token takes; none where that was not measured.

    Args:
        results: of models by name; "energy" is a :class:`dbf_compile.energy.TokenEnergy` as a dictionary.
    """
    measured = {name: row["energy"] for name, row in results.items() if "energy" in row}
    if not measured:
        return []
    first = next(iter(measured.values()))
    counters = list(first["joules"])
    rows = {"joules a new token, idle power apart": counters}
    rows |= {
        name: [_figure(energy["joules"][each]) for each in counters] for name, energy in measured.items()
    }
    rows |= {"watts of the idle machine": [_figure(first["idle_watts"][each]) for each in counters]}
    lines = [
        " ".join([f"{name[-40:]:40}", *(f"{cell:>11}" for cell in cells)]) for name, cells in rows.items()
    ]
    return [
        "",
        *lines,
        *(f"not measured: {counter}, {reason}" for counter, reason in first["missing"].items()),
    ]


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def layer_cells(operations: Mapping[str, int]) -> str:
    """Return additions, look-ups and multiplications of a factored layer, and multiplications when dense, in columns."""
    names = ("additions", "lookups", "multiplications", "dense_multiplications")
    return " ".join(f"{operations[name]:13,}" for name in names)
