"""Tables that the command line prints."""

from __future__ import annotations

from typing import Any

from dbf_compile.cli_tables import LAYER_HEAD, energy_lines, layer_cells, operation_lines


def counts(*values: int) -> dict[str, int]:
    names = ("additions", "lookups", "lookup_additions", "multiplications")
    return dict(zip(names, values, strict=True))


def words(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


def test_operations_by_kind_of_layer() -> None:
    operations: dict[str, Any] = {
        "factored": counts(4000, 1000, 1100, 70),
        "quantized": counts(0, 0, 0, 16),
        "dense": counts(0, 0, 0, 0),
        "total": counts(4000, 1000, 1100, 70),
        "dense_model": counts(2000, 0, 2000, 2100),
        "experts": ["2 of 8"],
        "uncounted_weights": 1234,
    }
    lines = words(operation_lines(operations))
    assert lines[:5] == [
        "a token, in its layers additions as look-ups and additions multiplications",
        "factored 4,000 1,000 1,100 70",
        "tables of rows 0 0 0 16",
        "all 4,000 1,000 1,100 70",
        "all, in the dense model 2,000 0 2,000 2,100",
    ]
    assert "experts that it reaches: 2 of 8" in lines
    assert "not counted: 1,234 weights of other modules" in lines
    lines = operation_lines(operations | {"experts": [], "uncounted_weights": 0})
    assert len(lines) == 6 and len({len(line) for line in lines[:5]}) == 1


def test_columns_of_a_layer_stand_below_their_heads() -> None:
    cells = layer_cells({**counts(4000, 1000, 1100, 70), "dense_multiplications": 2100})
    assert cells.split() == ["4,000", "1,000", "70", "2,100"] and len(cells) == len(LAYER_HEAD)


def test_energy_is_never_zero_where_it_is_missing() -> None:
    energy = {
        "joules": {"package": 0.12345, "dram": None},
        "idle_watts": {"package": 20.0, "dram": None},
        "missing": {"dram": "no RAPL zone"},
    }
    dense = energy | {"joules": {"package": 0.5, "dram": None}}
    assert words(energy_lines({"small": {"energy": energy}, "dense": {"energy": dense}})) == [
        "",
        "joules a new token, idle power apart package dram",
        "small 0.1235 -",
        "dense 0.5 -",
        "watts of the idle machine 20 -",
        "not measured: dram, no RAPL zone",
    ]
    assert energy_lines({"small": {"decode_rate": 1.0}}) == []
