"""A checked request to compress a model: everything that a run works on, and the fingerprint of its results."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbf_compile.calibration.mixture import interleaved
from dbf_compile.calibration.model_io import to_device
from dbf_compile.errors import ConversionError, OptionError, WeightError
from dbf_compile.hashes import model_hash, source_hash
from dbf_compile.machine import chosen_device
from dbf_compile.options import CompressOptions
from dbf_compile.progress import say
from dbf_compile.run.calibration_data import CalibrationData
from dbf_compile.run.output import check_output, check_place
from dbf_compile.run.report import ModelFacts
from dbf_compile.run.verification import differences


@dataclass(frozen=True)
class Source:
    """The model to compress and what belongs to it.

    Args:
        model: dense, as ``from_pretrained`` gives it; its tensors are those of the caller or of the mapped files, not copies.
        folder: where it came from, or None for a model in memory.
        name: for the report.
        content: hash of configuration and weights.
        original: a view of the caller's model, or None for a folder.
        file_type: of the quantized file that the folder was dequantized from, or None.
        place: path or name on the Hub, or None for a model in memory.
    """

    model: nn.Module
    folder: Path | None
    name: str
    content: str
    original: nn.Module | None = None
    file_type: str | None = None
    place: str | None = None

    @staticmethod
    def of(model: str | Path | nn.Module, trust_remote_code: bool = False) -> Source:
        """Open a folder or a model of the Hub without reading its weights; of a module, take what a folder would keep."""
        from dbf_compile.integrations import pretrained

        if isinstance(model, nn.Module):
            model = pretrained.unwrapped(model)
            twin = pretrained.reopened(model)
            return Source(twin, None, type(model).__name__, model_hash(twin), view_of(model).eval())
        folder = pretrained.local_folder(model)
        opened = pretrained.open_dense(folder, trust_remote_code)
        return Source(
            opened,
            folder,
            Path(model).name,
            pretrained.content_hash(folder),
            file_type=pretrained.file_type(folder),
            place=str(Path(model).absolute() if Path(model).exists() else model),
        )


@dataclass(frozen=True)
class Request:
    """One call of ``compress``.

    Args:
        source: the dense model.
        output: the folder to write.
        config: with its mode resolved: "independent" or "sequential".
        tokenizer: saved with a model that has no folder; may be None.
        data: what to calibrate, train and judge with; may be empty.
        device: where to compute.
    """

    source: Source
    output: Path
    config: CompressOptions
    tokenizer: Any
    data: CalibrationData
    device: torch.device

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
            WeightError: a weight is no number.
        """
        _check(model, output, config, data, batches)
        device = chosen_device(config.device)
        say(f"opening {_name_of_model(model)}, and hashing its weights", config.progress)
        source = Source.of(model, config.trust_remote_code)
        _check_place(source, output, config, tokenizer)
        _check_finite(source)
        if tokenizer is None and batches is None:
            tokenizer = _tokenizer(source, config, data is not None)
        texts, config = CalibrationData.of(source.model, config, data, batches, tokenizer, device)
        batch = to_device(next(iter(texts.calibrating), None), next(source.model.parameters()).device)
        _check_original(source, batch)
        source = replace(source, original=None)
        return Request(source, output, config, tokenizer, texts, device)

    @property
    def calibrating(self) -> list[Any]:
        """The batches to calibrate and train with."""
        return self.data.calibrating

    @property
    def judging(self) -> list[Any]:
        """The batches to judge with."""
        return interleaved(list(self.data.judging.values()))

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
            file_type=self.source.file_type,
            source=self.source.place,
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


def _name_of_model(model: str | Path | nn.Module) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def view_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares all its tensors: layers can be replaced without a trace in the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _check(model: Any, output: Path, config: CompressOptions, data: Any, batches: Any) -> None:
    check_output(output)
    if data is not None and batches is not None:
        raise OptionError("data and batches", "one of them", "pass text as data, or ready batches")


def _check_place(source: Source, output: Path, config: CompressOptions, tokenizer: Any) -> None:
    """Refuse before the work what would fail after it: an output inside its source, and whatever cannot be saved."""
    from dbf_compile.integrations import folder as model_folder

    bits = min([config.bits_per_weight, *config.overrides.values()])
    weights = sum(parameter.numel() for parameter in source.model.parameters())
    check_place(output, source.folder, int(2 * weights * bits / 8))  # results and folder are there at once
    model_folder.check_saving(source.model, source.folder, tokenizer, output.parent)


def _check_finite(source: Source) -> None:
    """Refuse a weight that is no number: what flows through the model would be none, in every layer after it."""
    for name, weight in source.model.named_parameters():
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.numel() == 0:
            continue
        # One pass without temporaries, unlike isfinite; a NaN comes out, too.
        if not all(bool(end.isfinite()) for end in weight.detach().aminmax()):
            raise WeightError(
                f"{name}: a weight with NaN or infinite entries in {source.place or source.name}",
                "finite entries",
                "check the checkpoint it was loaded from, or download it again",
            )


def _check_original(source: Source, batch: Any) -> None:
    """Refuse a model that does not come back from a folder as it is: its hooks and settings of its own would be lost."""
    if source.original is None:
        return
    lost = differences(source.original, source.model, batch)
    if lost is not None:
        raise ConversionError(
            f"a model of type {source.name} that from_pretrained would load as another ({lost})",
            "a model that its class, its configuration and its tensors describe",
            "remove what was added to it, or give it a class and a configuration of its own",
        )


def _tokenizer(source: Source, config: CompressOptions, needed: bool) -> Any:
    """Return the tokenizer in the model's folder, or None where there is none and it is not needed."""
    from dbf_compile.integrations import pretrained

    try:
        return pretrained.tokenizer_of(source.folder, config.trust_remote_code)
    except ConversionError:
        if needed:
            raise
        return None
