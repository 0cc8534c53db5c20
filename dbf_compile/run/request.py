"""A checked request to compress a model: everything that a run works on, and the fingerprint of its results."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbf_compile.calibration.batches import token_batches
from dbf_compile.calibration.model_io import to_device, token_ids
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.hashes import batches_hash, model_hash, source_hash
from dbf_compile.machine import chosen_device
from dbf_compile.options import CompressOptions
from dbf_compile.run.report import DataFacts, ModelFacts


@dataclass(frozen=True)
class Source:
    """The model to compress and what belongs to it.

    Args:
        model: dense; its tensors are those of the caller or of the mapped files, not copies.
        folder: where it came from, or None for a model in memory.
        name: for the report.
        content: hash of configuration and weights.
    """

    model: nn.Module
    folder: Path | None
    name: str
    content: str

    @staticmethod
    def of(model: str | Path | nn.Module, trust_remote_code: bool = False) -> Source:
        """Open a folder or a model of the Hub without reading its weights; of a module, take a view."""
        from dbf_compile.integrations import pretrained

        if isinstance(model, nn.Module):
            view = view_of(model).eval().requires_grad_(False)
            return Source(view, None, type(model).__name__, model_hash(view))
        folder = pretrained.local_folder(model)
        opened = pretrained.open_dense(folder, trust_remote_code)
        return Source(opened, folder, Path(model).name, pretrained.content_hash(folder))


@dataclass(frozen=True)
class Request:
    """One call of ``compress``.

    Args:
        source: the dense model.
        output: the folder to write.
        config: with its mode resolved: "independent" or "sequential".
        tokenizer: saved with a model that has no folder; may be None.
        calibrating: batches to calibrate and train with, on ``device``; may be empty.
        judging: batches to judge with, on ``device``; may be empty.
        device: where to compute.
        data: facts about the batches, for the report.
    """

    source: Source
    output: Path
    config: CompressOptions
    tokenizer: Any
    calibrating: list[Any]
    judging: list[Any]
    device: torch.device
    data: DataFacts

    @staticmethod
    def of(
        model: str | Path | nn.Module,
        output: Path,
        config: CompressOptions,
        data: str | Path | Iterable[Any] | None,
        batches: Sequence[Any] | None,
        tokenizer: Any,
    ) -> Request:
        """Check the arguments of ``compress`` and open the model.

        Raises:
            OptionError: arguments that exclude each other, or an output that cannot be written.
            ConversionError: no model of transformers, or no tokenizer for the data.
        """
        _check(model, output, config, data, batches)
        source = Source.of(model, config.trust_remote_code)
        windows = list(batches or [])
        if data is not None:
            if tokenizer is None:
                from dbf_compile.integrations import pretrained

                tokenizer = pretrained.tokenizer_of(source.folder, config.trust_remote_code)
            count = config.windows + config.holdout
            windows = list(token_batches(data, tokenizer, length=config.length, count=count))
        if config.mode == "auto":
            config = replace(config, mode="sequential" if windows else "independent")
        judged = min(config.holdout, len(windows) // 5)  # where data is short, calibration needs it more
        calibrating, judging = windows[: len(windows) - judged], windows[len(windows) - judged :]
        facts = DataFacts(
            source=str(data)
            if isinstance(data, (str, Path))
            else ("batches" if windows else "random tokens"),
            hash=batches_hash(windows),
            windows=len(calibrating),
            tokens=sum(_token_count(batch) for batch in calibrating),
        )
        device = chosen_device(config.device)
        calibrating, judging = (
            [to_device(batch, device) for batch in part] for part in (calibrating, judging)
        )
        return Request(source, output, config, tokenizer, calibrating, judging, device, facts)

    @property
    def model(self) -> nn.Module:
        """The dense model."""
        return self.source.model

    @property
    def model_facts(self) -> ModelFacts:
        """Facts about the dense model, for the report."""
        return ModelFacts(
            name=self.source.name,
            architecture=type(self.model).__name__,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            hash=self.source.content,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what all results depend on: model, data, settings and program."""
        content = {
            "model": self.source.content,
            "data": self.data.hash,
            "settings": self.config.result_settings(),
            "program": source_hash("dbf_compile"),
        }
        result: dict[str, Any] = json.loads(json.dumps(content))
        return result

    def settings(self) -> dict[str, Any]:
        """Return all options as JSON holds them, for the report."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self.config), default=str))
        return result


def view_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares all its tensors: layers can be replaced without a trace in the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _check(model: Any, output: Path, config: CompressOptions, data: Any, batches: Any) -> None:
    if not output.parent.is_dir():
        raise OptionError(
            f"output {output}, whose parent is no folder", "a folder that exists", "make it first"
        )
    if data is not None and batches is not None:
        raise OptionError("data and batches", "one of them", "pass text as data, or ready batches")
    if config.mode == "sequential" and data is None and not batches:
        raise OptionError(
            "mode='sequential' without data",
            "data or batches",
            "pass data='text.txt', or mode='independent'",
        )
    if isinstance(model, nn.Module) and not hasattr(model, "config"):
        raise ConversionError(
            f"a model of type {type(model).__name__}",
            "a model of transformers, its folder, or its name on the Hub",
            "use dbf_compile.convert_ for other modules",
        )


def _token_count(batch: Any) -> int:
    ids = token_ids(batch)
    return 0 if ids is None else ids.numel()
