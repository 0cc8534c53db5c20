"""The fields of the records as keywords, so that an editor and a type checker know them: ``**options: Unpack[...]``.

Each class mirrors a record of :mod:`dbf_compile.options` and adds its short spellings; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch


class CompressionKeywords(TypedDict, total=False):
    """Fields of ``CompressionConfig``; ``bits`` is short for ``bits_per_weight``."""

    bits_per_weight: float
    bits: float
    overrides: Mapping[str, float]
    skip: Sequence[str]
    head: str | float
    embedding: str
    merge_shared_inputs: bool
    preset: str
    iterations: int | None
    seed: int
    cache_dir: str | Path | None
    progress: bool


class AllocationKeywords(CompressionKeywords, total=False):
    """Fields of ``AllocationConfig``."""

    multiple: int
    floor: float | None
    ceiling: float | None
    depth_prior: float


class CompressKeywords(CompressionKeywords, total=False):
    """Fields of ``CompressOptions``; ``form`` is an old spelling of ``curvature``."""

    mode: str
    length: int | None
    windows: int | None
    shares: Mapping[str, float]
    own_text: float | None
    own_temperature: float
    own_top_k: int
    column: str | None
    split: str | None
    holdout: int
    curvature: str
    form: str
    temper: float | None
    budget: str
    tune: int | None
    refine: int | None
    distill: int | None
    max_shard_size: int
    resume: str
    workers: int | None
    device: torch.device | str | None
    trust_remote_code: bool
    keep_work: bool


class CalibrationKeywords(TypedDict, total=False):
    """Fields of ``CalibrationConfig``; ``form`` is an old spelling of ``curvature``."""

    loss: Callable[..., Any] | str | None
    curvature: str
    form: str
    layers: Sequence[str]
    clip: float | None
    device: torch.device | str | None
    seed: int
    progress: bool


class EvaluationKeywords(TypedDict, total=False):
    """Fields of ``EvaluationConfig``."""

    length: int | None
    windows: int
    column: str | None
    split: str | None
    tasks: Sequence[str]
    include_path: str | Path | None
    limit: float | None
    update_report: bool
    device: torch.device | str | None
    trust_remote_code: bool
    progress: bool


class FinetuneKeywords(TypedDict, total=False):
    """Fields of ``FinetuneConfig``."""

    tokens: int
    length: int | None
    batch: int
    own_text: float | None
    own_temperature: float
    own_top_k: int
    holdout: int
    judge: int
    sign_rate: float
    scale_rate: float
    norm_rate: float
    hidden: float
    top: int
    column: str | None
    split: str | None
    seed: int
    resume: str
    cache_dir: str | Path | None
    device: torch.device | str | None
    trust_remote_code: bool
    progress: bool


class SamplingKeywords(TypedDict, total=False):
    """Fields of ``Sampling``."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
