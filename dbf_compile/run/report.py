"""What a compression puts into its report: every part's outcome, and where it was made."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dbf_compile.compression.jobs import Part
from dbf_compile.machine import cores


def outcome(
    parts: Sequence[Part], facts: Mapping[str, Mapping[str, Any]], distilled: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return "layers" and "stages" of a report.

    Args:
        parts: all that was factored.
        facts: errors, seconds and stages by name of the result.
        distilled: what distillation gained, or None.
    """
    stages = [stage for found in facts.values() for stage in found["stages"]]
    if distilled is not None and "kl" in distilled["after"]:
        stages.append(
            {
                "stage": "distill",
                "block": None,
                "measure": "KL from the dense model",
                "before": distilled["before"]["kl"],
                "after": distilled["after"]["kl"],
                "seconds": distilled["seconds"],
            }
        )
    layers = [
        {
            "name": part.job.name,
            "shape": [part.job.out_features, part.job.in_features],
            "mid_features": part.job.mid_features,
            "bits_per_weight": part.stored / part.job.size,
            "error": facts[part.result]["errors"][part.job.name],
            "seconds": facts[part.result]["seconds"][part.job.name],
            "block": part.block,
        }
        for part in parts
    ]
    return {"layers": layers, "stages": stages}


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return the program, the time, the memory and the machine of this process."""
    return {
        "dbf_compile": version("dbf-compile"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "memory": {"peak_bytes": _peak_memory()},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": cores(),
            "device": str(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _peak_memory() -> int:
    """Return the most memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report_of(folder: Path) -> dict[str, Any]:
    """Return the report of the compression that made a folder, or nothing where it has none that can be read."""
    try:
        found = json.loads((folder / _REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_REPORT, _PAGE = "dbf_report.json", "dbf_report.html"
