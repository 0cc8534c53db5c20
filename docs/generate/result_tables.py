"""Tables and charts of ``benchmarks/results/*.csv``, each with its command, machine and versions."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import charts

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"

Row = dict[str, str]
# What the files call what the documents call otherwise.
_NAMES = {"block": "sequential", "official": "the authors' factorizer", "tables": "look-up tables"}
_PEERS = {
    "official": "the authors'",
    "fast": "fast",
    "balanced": "balanced",
    "onebit": "OneBit",
    "rtn": "round to nearest",
    "hqq": "HQQ",
}


def read(name: str) -> list[Row]:
    """Return the rows of ``benchmarks/results/<name>.csv``."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def source(name: str, *command: str) -> str:
    """Return where the figures of a file come from: the command, the file, machines, versions, dates and commits."""
    rows = read(name)
    parts = [f"`{' '.join(command)}`" if command else "", f"`benchmarks/results/{name}.csv`"]
    for columns in (("machine", "gpu"), ("versions", "gpu_versions"), ("date",), ("commit",)):
        values = dict.fromkeys(row[column] for column in columns for row in rows if row.get(column))
        if values:
            parts.append(("commit " if columns == ("commit",) else "") + "; ".join(values))
    return "\n<small>" + " · ".join(part for part in parts if part) + "</small>"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [_line(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *(_line(row) for row in rows)])


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(one) for one in cells) + " |"


def figure(value: str | float) -> str:
    """Return a number with four digits, anything else as it is."""
    try:
        number = float(value)
    except ValueError:
        return str(value)
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def rows(name: str, *columns: str) -> str:
    """Return columns of a file as they are, all rows."""
    return markdown(
        [column.replace("_", " ") for column in columns],
        ([_text(row[column]) for column in columns] for row in read(name)),
    )


def _text(value: str) -> str:
    return _NAMES.get(value, figure(value)) or "–"


def compress(model: str) -> str:
    """Return loss against bits of one compressed language model."""
    ways: dict[str, list[tuple[float, float]]] = {}
    found = read(f"compress_{model}")
    for row in found:
        if row["way"] in ("independent", "block", "OneBit", "round to nearest"):
            ways.setdefault(_text(row["way"]), []).append((float(row["bits"]), float(row["nats_lost"])))
    order = sorted(found, key=lambda row: (-float(row["bits"]), float(row["nats_lost"])))
    table = markdown(
        ["bits", "way", "nats lost", "perplexity", "KL", "top-1"],
        (
            [
                figure(row["bits"]),
                row["way"].replace("block", "sequential"),
                *(figure(row[column]) for column in ("nats_lost", "perplexity", "kl", "top1_agreement")),
            ]
            for row in order
        ),
    )
    label = f"{model}: nats a token lost over the dense model"
    return charts.lines(ways, "bits per weight", label) + "\n\n" + table


def cpu_layer(shape: str, tokens: str, threads: str) -> str:
    """Return the contenders of one shape."""
    place = {"shape": shape, "tokens": tokens, "threads": threads}
    found = [row for row in read("cpu_layer") if place.items() <= row.items()]
    times = {row["contender"]: float(figure(row["median_us"])) for row in found}
    label = f"{shape}, {_count(tokens, 'token')}, {_count(threads, 'thread')}: µs, median"
    chart = charts.bars(times, label, [name for name in times if name.startswith("dbf")])
    table = markdown(
        ["contender", "bits", "µs", "GB/s", "times torch bf16", "relative error"],
        (
            [
                row["contender"],
                figure(row["bits"]) if float(row["bits"]) else "–",
                *(figure(row[column]) for column in ("median_us", "gb_per_s", "times_torch_bf16")),
                figure(row["relative_error"]) if _is_exact(row) else "–",
            ]
            for row in found
        ),
    )
    return chart + "\n\n" + table


def _is_exact(row: Row) -> bool:
    """Return whether a contender multiplies by the weights that it was given, not by rounded ones."""
    return row["contender"].startswith(("torch fp", "torch bf", "llama.cpp F16", "dbf"))


def _count(number: str, what: str) -> str:
    return f"{number} {what}" if number == "1" else f"{number} {what}s"


def cpu_shapes(tokens: str, threads: str) -> str:
    """Return the median time of every contender for every shape."""
    found = [row for row in read("cpu_layer") if (row["tokens"], row["threads"]) == (tokens, threads)]
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    contenders: dict[tuple[str, str], dict[str, str]] = {}
    for row in found:
        target = _target(row)
        contenders.setdefault((row["contender"], target), {})[row["shape"]] = figure(row["median_us"])
    body = (
        [name, bits, *(times.get(shape, "–") for shape in shapes)]
        for (name, bits), times in contenders.items()
    )
    return markdown(["µs", "bits", *shapes], body)


def _target(row: Row) -> str:
    bits = float(row["bits"])
    return f"{bits:.2g}" if bits else "–"


def decode() -> str:
    """Return tokens per second of whole models."""
    found = read("cpu_decode")
    variants = list(dict.fromkeys(row["variant"] for row in found))
    models: dict[str, dict[str, str]] = {}
    for row in found:
        rate, memory = float(row["decode_tokens_per_s"]), float(row["model_mb"])
        models.setdefault(row["model"], {})[row["variant"]] = f"{rate:.1f} ({memory:.0f})"
    chart = charts.bars(
        {
            f"{row['model'].split(',')[0]}, {row['variant']}": round(float(row["decode_tokens_per_s"]), 1)
            for row in found
        },
        "tokens/s, decoding after a prompt of 128 tokens, two threads",
        [
            f"{row['model'].split(',')[0]}, {row['variant']}"
            for row in found
            if row["variant"].startswith("dbf")
        ],
    )
    table = markdown(
        ["tokens/s (memory, MB)", *models],
        ([variant, *(figures[variant] for figures in models.values())] for variant in variants),
    )
    return chart + "\n\n" + table


def ratios(name: str, *methods: str) -> str:
    """Return errors and times over those of the authors' factorizer, by bits and preset."""
    found = read(name)
    theirs = {(row["matrix"], row["target"]): row for row in found if row["method"] == "official"}
    body = []
    for target in dict.fromkeys(row["target"] for row in found):
        for method in methods:
            own = [row for row in found if (row["target"], row["method"]) == (target, method)]
            errors = [_ratio(row, theirs, "error") for row in own]
            times = [_ratio(row, theirs, "seconds") for row in own]
            numbers = [median(errors), max(errors), min(errors), median(times), max(times)]
            body.append([figure(target), f"`{method}`", len(own), *(f"{number:.3f}" for number in numbers)])
    return markdown(
        ["bits", "preset", "matrices", "error, median", "worst", "best", "time, median", "longest"], body
    )


def _ratio(row: Row, theirs: Mapping[tuple[str, str], Row], column: str) -> float:
    return float(row[column]) / float(theirs[row["matrix"], row["target"]][column])


def curves(*matrix: str) -> str:
    """Return the chart of error against bits of one matrix."""
    name = " ".join(matrix)
    methods: dict[str, list[tuple[float, float]]] = {}
    for row in read("factorizer_curves"):
        if row["matrix"] == name:
            method = _PEERS[row["method"].rstrip("234")]
            methods.setdefault(method, []).append((float(row["bits"]), float(row["error"])))
    return charts.lines(methods, "bits per weight", f"{name}: weighted error", log=True)


def importance(name: str, column: str, bits: str) -> str:
    """Return what forms of importance and budgets give, at about so many bits."""
    found = [row for row in read(name) if abs(float(row["bits"]) - float(bits)) < 0.05]
    table: dict[str, dict[str, str]] = {}
    for row in found:
        table.setdefault(row["importance"], {})[row["budget"]] = figure(row[column])
    body = (
        [kind, figures.get("equal", "–"), figures.get("allocated", "–")] for kind, figures in table.items()
    )
    return markdown([f"{column.replace('_', ' ')} at {bits} bits", "equal budget", "allocated"], body)


def gpu(tokens: str) -> str:
    """Return the best time of each round for every matrix, at so many tokens."""
    found = [row for row in read("gpu_rounds") if row["tokens"] == tokens]
    rounds = sorted({row["round"] for row in found})
    table: dict[str, dict[str, float]] = {}
    dense: dict[str, list[float]] = {}
    for row in found:
        times = table.setdefault(row["rows_x_columns"], {})
        times[row["round"]] = min(float(row["median_us"]), times.get(row["round"], float("inf")))
        if row["cublas_bf16_us"]:
            dense.setdefault(row["rows_x_columns"], []).append(float(row["cublas_bf16_us"]))
    body = (
        [
            shape,
            *(figure(times[number]) if number in times else "–" for number in rounds),
            figure(median(dense[shape])) if shape in dense else "–",
        ]
        for shape, times in table.items()
    )
    return markdown(
        [f"{tokens} token(s), µs", *(f"round {number}" for number in rounds), "cuBLAS bf16"], body
    )


def machine_code(target: str) -> str:
    """Return what the GPU kernels compile to for one architecture."""
    columns = (
        "kernel",
        "tokens",
        "dtype",
        "tile",
        "instructions_per_sign",
        "multiplications",
        "matrix",
        "BAR",
        "registers",
    )
    found = [row for row in read("sass") if row["target"] == target]
    return markdown(
        [column.replace("_", " ") for column in columns],
        ([_text(row[column]) for column in columns] for row in found),
    )


_LAPTOP = (
    ("prefill_per_s", 1, "prefill, tokens/s"),
    ("decode_per_s", 1, "decoding, tokens/s"),
    ("decode_per_s", 8, "decoding, batch of 8"),
    ("resident_mb", 1, "memory, MB"),
    ("weights_mb", 1, "file, MB"),
)


def laptop(model: str, prompt: str, threads: str) -> str:
    """Return the speed and the memory of one model, variant by variant."""
    place = {"model": model, "prompt": prompt, "threads": threads}
    rows = [row for row in read("laptop") if place.items() <= row.items()]
    by_batch: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_batch.setdefault(row["variant"], {})[row["batch"]] = row
    table = markdown(
        ["variant", *(title for *_, title in _LAPTOP)],
        (
            [variant, *(_cell(batches.get(str(batch)), column) for column, batch, _ in _LAPTOP)]
            for variant, batches in by_batch.items()
        ),
    )
    rates = {
        variant: float(figure(batches["1"]["decode_per_s"]))
        for variant, batches in by_batch.items()
        if "1" in batches
    }
    label = f"{model}: tokens/s, decoding after a prompt of {prompt} tokens, {threads} threads"
    return charts.bars(rates, label, [name for name in rates if name.startswith("dbf")]) + "\n\n" + table


def laptop_starts(model: str) -> str:
    """Return the seconds from the start of a process to its first token."""
    rows = [row for row in read("laptop") if row["model"] == model and row["cold_s"]]
    return markdown(
        ["variant", "first start, s", "second start, s"],
        ([row["variant"], figure(row["cold_s"]), figure(row["warm_s"])] for row in rows),
    )


def _cell(row: Mapping[str, str] | None, column: str) -> str:
    return figure(row[column]) if row and row[column] else "–"


GENERATORS: dict[str, Callable[..., str]] = {
    "laptop": laptop,
    "laptop_starts": laptop_starts,
    "source": source,
    "rows": rows,
    "compress": compress,
    "cpu_layer": cpu_layer,
    "cpu_shapes": cpu_shapes,
    "decode": decode,
    "ratios": ratios,
    "curves": curves,
    "importance": importance,
    "gpu": gpu,
    "machine_code": machine_code,
}
