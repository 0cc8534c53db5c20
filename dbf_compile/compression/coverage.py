"""Coverage: the share of a model's weights that is factored, and why the rest stays dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from dbf_compile.compression.layers import LayerFactorizer, why_dense
from dbf_compile.compression.tables import plan_tables
from dbf_compile.linear import is_conv1d
from dbf_compile.options import CompressionConfig

_TABLE = "a table of"
_SMALL = ("norm", "bias")  # reasons of thousands of tiny parameters, which share one row


def coverage(
    model: nn.Module,
    factored: Collection[str],
    config: CompressionConfig,
    tables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the share of a model's weights that is factored, and the rest with reasons, largest first.

    Args:
        model: the model with all its layers dense; a weight under several names counts once.
        factored: names of the factored layers.
        config: the configuration that selected them.
        tables: names of the layers that read tables, to their formats; None for those that the configuration selects.

    Returns:
        ``{"share": 0 to 1, "weights": number, "dense": [{"name", "weights", "share", "reason"}]}``, tables among the rest
    """
    reasons = why_dense(model, LayerFactorizer(config).for_model(model))
    plan = plan_tables(model, config)
    kinds = plan.kinds if tables is None else tables
    reasons |= plan.reasons | {name: f"{_TABLE} {kind} rows" for name, kind in kinds.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    rows: dict[tuple[str, str], int] = {}
    covered = 0
    seen: set[int] = set()
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name in factored and kind == "weight":
                covered += parameter.numel()
                continue
            reason = (kind == "weight" and reasons.get(name)) or _reason(module, kind)
            row = ("all norms and biases", "norm or bias") if reason in _SMALL else (name, reason)
            rows[row] = rows.get(row, 0) + parameter.numel()
    dense = [
        {"name": name, "weights": size, "share": size / total, "reason": reason}
        for (name, reason), size in sorted(rows.items(), key=lambda item: -item[1])
    ]
    return {"share": covered / max(1, total), "weights": total, "dense": dense}


def left_dense_share(covered: Mapping[str, Any]) -> float:
    """Return the share of the weights that is neither factored nor in tables."""
    rows = [row for row in covered["dense"] if not row["reason"].startswith(_TABLE)]
    return float(sum(row["share"] for row in rows))


def _reason(module: nn.Module, kind: str) -> str:
    if kind.endswith("bias"):
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "left dense"
    return f"not a linear layer ({type(module).__name__})"
