"""The report of a compression: what ``dbf_report.json`` holds, as frozen records that check what they are read from.

Every record is also the dictionary that JSON holds, so ``report["bits"]["factored"]`` and ``report.bits.factored`` are the same,
and ``json.dumps(report)`` works. Of an optional field that is absent, null and empty mean the same.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch

from dbf_compile.calibration.kinds import OWN_TEXT
from dbf_compile.errors import CheckpointError
from dbf_compile.machine import cores

REPORT, PAGE = "dbf_report.json", "dbf_report.html"
BATCHES, RANDOM_TOKENS = "batches", "random tokens"  # sources that are no text
_MAKE_AGAIN = "dbf_report.json is damaged: compress the model again"

# Comparisons, not math.isfinite: JSON knows whole numbers that no float can hold.
Number = Annotated[float, "a finite number"]
Amount = Annotated[float, "a finite number of at least 0"]
Count = Annotated[int, "a whole number of at least 0"]


class _Part(dict[str, Any]):
    """A frozen dataclass that is also a dictionary of its fields; None is left out where it says nothing."""

    _keeps_null: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if value is not None or self._keeps_null:
                self[item.name] = list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ModelFacts(_Part):
    """The dense model: name, class, parameters, hash of its content, type of its file if that was quantized, where it was."""

    name: str
    architecture: str | None = None
    parameters: Count | None = None
    hash: str | None = None
    file_type: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class DataPart(_Part):
    """Text of one kind that was calibrated with: where it came from, its windows and tokens."""

    source: str | None = None
    windows: Count | None = None
    tokens: Count | None = None


@dataclass(frozen=True)
class DataFacts(_Part):
    """What was calibrated with: where it came from, its hash, windows and tokens; of texts also by kind."""

    source: str | None = None
    hash: str | None = None
    windows: Count | None = None
    tokens: Count | None = None
    kinds: dict[str, DataPart] | None = None

    @property
    def one_kind(self) -> str | None:
        """What text was calibrated with if it was of one kind alone: the kind, or the source if no kind was said; else None."""
        if self.kinds:
            return next(iter(self.kinds)) if len(self.kinds) == 1 and OWN_TEXT not in self.kinds else None
        return None if self.source in (None, BATCHES, RANDOM_TOKENS) else self.source


@dataclass(frozen=True)
class Bits(_Part):
    """Bits per weight: asked for, of the factored weights, of the whole file over all weights."""

    factored: Amount
    target: Amount | None = None
    file: Amount | None = None


@dataclass(frozen=True)
class DenseRow(_Part):
    """Weights that are not factored, how many, their share of all, and why."""

    name: str
    weights: Count | None = None
    share: Amount | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Coverage(_Part):
    """The share of the weights that is factored, the number of all, and what is not, largest first."""

    share: Amount
    weights: Count | None = None
    dense: tuple[DenseRow, ...] | None = None


@dataclass(frozen=True)
class LayerRow(_Part):
    """What was factored as one weight: names joined by " + ", [N, K], R, bits, weighted error, seconds, block."""

    _keeps_null: ClassVar[bool] = True

    name: str
    bits_per_weight: Amount
    shape: tuple[Count, ...] | None = None
    mid_features: Count | None = None
    error: Amount | None = None
    seconds: Amount | None = None
    block: Count | None = None


@dataclass(frozen=True)
class StageRow(_Part):
    """What a stage gained: its measure before and after, the seconds it took, and the epochs of training that are kept: 0 if
    none was better on the windows kept back.
    """

    _keeps_null: ClassVar[bool] = True

    stage: str
    before: Number  # a divergence of 0 may come out below it
    after: Number
    block: Count | None = None
    what: str | None = None
    measure: str | None = None
    seconds: Amount | None = None
    epochs: Count | None = None


@dataclass(frozen=True)
class KindEvaluation(_Part):
    """The distance from the dense model, as :func:`~dbf_compile.calibration.compare.compare` gives it."""

    measure: str | None = None
    kl: Number | None = None
    nats_lost: Number | None = None
    top1_agreement: Amount | None = None
    dense: Number | None = None
    compressed: Number | None = None
    perplexity: Number | None = None
    error: Amount | None = None


@dataclass(frozen=True)
class Evaluation(KindEvaluation):
    """The distance on text kept back. Of several kinds of text it is the mean, and there are the figures of each kind.

    It is empty where nothing was judged.
    """

    worst_kind: str | None = None
    kinds: dict[str, KindEvaluation] | None = None

    @staticmethod
    def of(measured: Mapping[str, Any]) -> Evaluation:
        """Return what ``compare`` or ``compare_kinds`` gives as a record; other keys are left out."""
        evaluation: Evaluation = _parse_record(Evaluation, measured, "evaluation")
        return evaluation


@dataclass(frozen=True)
class OperationCounts(_Part):
    """Numbers of operations, as :class:`~dbf_compile.compression.operations.Operations` has them."""

    additions: Count
    lookups: Count
    lookup_additions: Count
    multiplications: Count


@dataclass(frozen=True)
class OperationFacts(_Part):
    """What one token costs, as :class:`~dbf_compile.compression.operations.ModelOperations` has it."""

    factored: OperationCounts
    dense: OperationCounts
    total: OperationCounts  # of the model
    dense_model: OperationCounts
    quantized: OperationCounts | None = None
    experts: tuple[str, ...] | None = None
    uncounted_weights: Count | None = None

    @staticmethod
    def of(summary: Mapping[str, Any]) -> OperationFacts:
        """Return what ``ModelOperations.summary`` says as a record."""
        facts: OperationFacts = _parse(OperationFacts, summary, "operations")
        return facts


@dataclass(frozen=True)
class Memory(_Part):
    """The most memory that the process has had, in bytes; 0 where the system does not say."""

    peak_bytes: Count


@dataclass(frozen=True)
class Report(_Part):
    """The content of ``dbf_report.json``."""

    dbf_compile: str
    model: ModelFacts
    bits: Bits
    layers: tuple[LayerRow, ...]
    created: str | None = None
    data: DataFacts | None = None
    settings: dict[str, Any] | None = None
    coverage: Coverage | None = None
    stages: tuple[StageRow, ...] | None = None
    evaluation: Evaluation | None = None
    operations: OperationFacts | None = None
    time: dict[str, Amount] | None = None
    memory: Memory | None = None
    machine: dict[str, Any] | None = None
    fingerprint: dict[str, Any] | None = None

    @staticmethod
    def parse(content: object) -> Report:
        """Read a report from what JSON holds.

        Raises:
            CheckpointError: a field is missing, or is not what it should be; the message names it.
        """
        report: Report = _parse(Report, content, "")
        if not report.layers:
            raise CheckpointError("an empty list of layers", "one layer or more", _MAKE_AGAIN)
        return report


def read_report(folder: Path) -> Report | None:
    """Return the report of the compression that wrote a folder, or None where it has none that can be read."""
    try:
        return Report.parse(json.loads((folder / REPORT).read_text()))
    except (OSError, ValueError):  # CheckpointError and JSON's errors are ValueErrors
        return None


def one_kind_note(kind: str) -> str:
    """Return what to know of a model that was calibrated with one kind of text alone."""
    return f"Calibrated with one kind of text alone ({kind}): other kinds may have lost more than the one that was judged."


def environment(device: torch.device) -> dict[str, Any]:
    """Return the fields of a report that describe this process: program, time, memory and machine."""
    return {
        "dbf_compile": version("dbf-compile"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "memory": Memory(_peak_memory()),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": cores(),
            "device": str(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_T = TypeVar("_T")


def _parse(kind: Any, value: Any, place: str) -> Any:
    """Return ``value`` as the annotation ``kind`` wants it."""
    origin = get_origin(kind)
    if origin is UnionType or NoneType in get_args(kind):
        inner = next(one for one in get_args(kind) if one is not NoneType)
        if value is None or value == {} or value == []:
            # An empty list or evaluation says that there is nothing, not that it is not known.
            is_nothing = (value == {} and inner is Evaluation) or (value == [] and get_origin(inner) is tuple)
            return inner() if is_nothing else None
        return _parse(inner, value, place)
    if kind is Any:
        return value
    if origin is Annotated:
        base, allowed = get_args(kind)
        return _number(base, allowed, value, place)
    if kind is str:
        return value if isinstance(value, str) else _refuse(place, value, "text")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            _refuse(place, value, "a list")
        return tuple(_parse(get_args(kind)[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, Mapping):
        _refuse(place, value, "a mapping")
    if origin is dict:
        return {str(name): _parse(get_args(kind)[1], item, f"{place}.{name}") for name, item in value.items()}
    return _parse_record(kind, value, place)


def _parse_record(kind: type[_T], value: Mapping[str, Any], place: str) -> _T:
    assert is_dataclass(kind)
    hints = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for item in fields(kind):
        inside = f"{place}.{item.name}".lstrip(".")
        if item.name in value:
            values[item.name] = _parse(hints[item.name], value[item.name], inside)
        elif item.default is MISSING:
            raise CheckpointError(f"no {inside!r}", "a report with all of its fields", _MAKE_AGAIN)
    return kind(**values)


def _number(base: type, allowed: str, value: Any, place: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    low = 0.0 if "at least 0" in allowed else -1e300
    if not is_number or not low <= value < 1e300 or (base is int and not isinstance(value, int)):
        _refuse(place, value, allowed)
    return value


def _refuse(place: str, value: object, allowed: str) -> Any:
    text = repr(value)
    raise CheckpointError(
        f"{place or 'the report'} = {text if len(text) <= 80 else text[:77] + '...'}", allowed, _MAKE_AGAIN
    )
