"""A checked request to finetune a folder: what learns, from whom, and from which text."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import check_reads_tokens, is_causal
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.factors import SIGN_NAMES, TENSOR_NAMES
from dbf_compile.files import cache_folder, user_path
from dbf_compile.finetuning.student import small_parameters, stacks_of
from dbf_compile.finetuning.targets import Teacher
from dbf_compile.finetuning.text import Text
from dbf_compile.hashes import source_hash
from dbf_compile.options import FinetuneConfig
from dbf_compile.progress import say
from dbf_compile.run.output import check_output, check_place, existing, work_folder
from dbf_compile.run.report import Report, read_report
from dbf_compile.run.work import Work


@dataclass(frozen=True)
class Request:
    """One call of ``finetune``.

    Args:
        folder: the compressed folder.
        output: the folder to write.
        dense: the folder of the dense model.
        content: hash of the dense model.
        report: of the compression, or None.
        reading: what is learned from, but for what the dense model has yet to write.
        config: how.
        cache: folder of the dense model's predictions and text.
        device: where to compute.
    """

    folder: Path
    output: Path
    dense: Path
    content: str
    report: Report | None
    reading: Text
    config: FinetuneConfig
    cache: Path
    device: torch.device

    @staticmethod
    def of(
        places: tuple[str | Path, str | Path | None, str | Path | None],
        data: Any,
        tokenizer: Any,
        config: FinetuneConfig,
        device: torch.device,
    ) -> Request:
        """Check the arguments of ``finetune``.

        Args:
            places: folder, output and dense model.
            data, tokenizer, config, device: as they are there.

        Raises:
            OptionError: an output that exists, or cannot lie there; no dense model is known.
            ConversionError: the folder is no compressed language model, or the dense model is another one than it was
                compressed from; data that cannot be read.
            CheckpointError: the folder does not store what is trained.
        """
        from dbf_compile.integrations import pretrained, rewriting

        output = default_output(places[0]) if places[1] is None else user_path(places[1])
        check_output(output)
        if output.exists():
            raise existing(output)
        folder = pretrained.local_folder(places[0])
        say(f"opening {folder} and the dense model", config.progress)
        model = pretrained.open_any(folder, config.trust_remote_code)
        _check_learns(model, folder)
        signs = {id(tensor): tensor for name, tensor in _learning(model).items() if _is_signs(name)}
        # Two states with a byte a sign, which has a bit in the model, and one gradient.
        weights = sum(
            layer.out_features * layer.in_features for stack in stacks_of(model) for layer in stack.values()
        )
        check_place(output, folder, 2 * 32 * sum(tensor.numel() for tensor in signs.values()) + 4 * weights)
        rewriting.check_stores(folder, model, _learning(model))
        cache = _cache_of(config, output)
        report = read_report(folder)
        source = _dense_folder(folder, report, places[2])
        content = pretrained.content_hash(source)
        _check_content(content, report, source)
        if tokenizer is None:
            tokenizer = _tokenizer((folder, source), config, data is not None)
        text = Text.read(data, tokenizer, pretrained.open_dense(source, config.trust_remote_code), config)
        return Request(folder, output, source, content, report, text, config, cache, device)

    def student(self) -> Any:
        """Return the compressed model on the device."""
        from dbf_compile.integrations import pretrained

        return pretrained.open_any(self.folder, self.config.trust_remote_code).to(self.device)

    @cached_property
    def teacher_model(self) -> nn.Module:
        """The dense model on the device; opened when it is first asked for."""
        from dbf_compile.integrations import pretrained

        return pretrained.open_dense(self.dense, self.config.trust_remote_code).to(self.device)

    @cached_property
    def teacher(self) -> Teacher:
        """The predictions of the dense model."""
        folder = self.cache / "targets"
        return Teacher(lambda: self.teacher_model, self.content, self.config.top, folder, self.device)

    @cached_property
    def text(self) -> Text:
        """All text; what the dense model is to write is written when it is first asked for, and kept for other runs."""
        own = self.reading.own
        if own is None:
            return self.reading
        key = {"model": self.content, "text": own.fingerprint(), "program": source_hash("dbf_compile")}
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        work = Work(self.cache / "text" / name[:40], key)
        return self.reading.written(self.teacher_model, work, self.device, self.config)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the result depends on: both models, text, settings and program."""
        from dbf_compile.integrations import pretrained

        settings = {
            item.name: getattr(self.config, item.name)
            for item in fields(self.config)
            if item.metadata.get("changes_results", True)
        }
        content = {
            "model": pretrained.content_hash(self.folder),
            "dense model": self.content,
            "data": self.reading.hash(),
            "settings": settings,
            "program": source_hash("dbf_compile"),
        }
        result: dict[str, Any] = json.loads(json.dumps(content))
        return result


def default_output(folder: str | Path) -> Path:
    """Return the folder that is written where none is named; for a model of the Hub it lies in the current folder."""
    path = user_path(folder)
    path = path.absolute() if path.exists() else Path.cwd() / path.name.partition("@")[0]
    return path.with_name(f"{path.name}-finetuned")


def _check_learns(model: Any, folder: Path) -> None:
    from dbf_compile.integrations import pretrained

    check_reads_tokens(model)
    if pretrained.has_adapter(folder):
        raise ConversionError(
            f"{folder} with an adapter beside its layers",
            "the compressed model alone",
            "take the adapter out of the folder, and train it again on the new one",
        )
    if not stacks_of(model):
        raise ConversionError(
            f"{folder}, in which no layer is factored",
            "a folder written by dbf_compile.compress",
            "compress the model first",
        )
    if not is_causal(model):
        raise ConversionError(
            f"{folder} with a {type(model).__name__}",
            "a model that predicts the next token of a text",
            "compress with more epochs of refine and distill instead",
        )


def _learning(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a compressed model that may learn, by name."""
    layers = (one for stack in stacks_of(model) for one in stack.items())
    factors = {f"{name}.{part}": getattr(layer, part) for name, layer in layers for part in TENSOR_NAMES}
    return {**small_parameters(model), **factors}


def _is_signs(name: str) -> bool:
    return name.rpartition(".")[2] in SIGN_NAMES


def _cache_of(config: FinetuneConfig, output: Path) -> Path:
    """Return the folder of what other runs can use; that of the run where the user has none."""
    cache = cache_folder() if config.cache_dir is None else user_path(config.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if config.cache_dir is None:
            return work_folder(output)
        raise OptionError(
            f"cache_dir={str(cache)!r}, which cannot be made ({error.strerror})",
            "a folder that can be written",
            "choose another, or leave cache_dir out",
        ) from error
    return cache


def _dense_folder(folder: Path, report: Report | None, dense: str | Path | None) -> Path:
    """Return the folder of the dense model."""
    from dbf_compile.integrations import pretrained

    known = None if report is None else report.model.source
    if dense is not None:
        return pretrained.local_folder(dense)
    if known is None:
        raise OptionError(
            f"no dense model for {folder}, whose report names none",
            "the model that it was compressed from",
            "pass dense=..., on the command line --dense",
        )
    try:
        return pretrained.local_folder(known)
    except ConversionError as error:
        raise ConversionError(
            f"{folder}, whose report names as the dense model {known}, which is not there ({error.got})",
            "the model that it was compressed from",
            "pass dense=... with its place now, on the command line --dense",
        ) from error


def _tokenizer(folders: Sequence[Path], config: FinetuneConfig, needed: bool) -> Any:
    """Return the tokenizer of the first folder that has one, or None where none does and it is not needed."""
    from dbf_compile.integrations import pretrained

    for folder in folders:
        try:
            return pretrained.tokenizer_of(folder, config.trust_remote_code)
        except ConversionError:
            if needed and folder == folders[-1]:
                raise
    return None


def _check_content(content: str, report: Report | None, source: Path) -> None:
    expected = None if report is None else report.model.hash
    if expected not in (None, content):
        raise ConversionError(
            f"{source} as the dense model, whose content is another one than was compressed",
            "the model that the folder was compressed from",
            "pass dense=... with that model, on the command line --dense",
        )
