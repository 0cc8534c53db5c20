"""A checked request to finetune a folder: what learns, from whom, and from which text."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbf_compile.calibration.model_io import check_reads_tokens, is_causal
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.files import cache_folder, user_path
from dbf_compile.finetuning.student import stacks_of
from dbf_compile.finetuning.targets import Teacher
from dbf_compile.finetuning.text import Text
from dbf_compile.hashes import batches_hash, source_hash
from dbf_compile.options import FinetuneConfig
from dbf_compile.progress import say
from dbf_compile.run.output import check_output, existing
from dbf_compile.run.report import Report, read_report


@dataclass(frozen=True)
class Request:
    """One call of ``finetune``.

    Args:
        folder: the compressed folder.
        output: the folder to write.
        dense: the folder of the dense model.
        content: hash of the dense model.
        report: of the compression, or None.
        text: what is learned from.
        config: how.
        device: where to compute.
    """

    folder: Path
    output: Path
    dense: Path
    content: str
    report: Report | None
    text: Text
    config: FinetuneConfig
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
            OptionError: an output that exists; no dense model is known.
            ConversionError: the folder is no compressed language model, or the dense model is another one than it was
                compressed from; data that cannot be read.
        """
        from dbf_compile.integrations import pretrained

        folder = user_path(places[0])
        output = default_output(folder) if places[1] is None else user_path(places[1])
        check_output(output)
        if output.exists():
            raise existing(output)
        if data is None:
            raise OptionError("no data", "text to learn from", "pass data=..., on the command line --data")
        report = read_report(folder)
        say(f"opening {folder} and the dense model", config.progress)
        _check_learns(pretrained.open_any(folder, config.trust_remote_code), folder)
        source = pretrained.local_folder(_dense_of(folder, report, places[2]))
        content = pretrained.content_hash(source)
        _check_content(content, report, source)
        if tokenizer is None:
            tokenizer = pretrained.tokenizer_of(folder, config.trust_remote_code)
        text = Text.read(data, tokenizer, pretrained.open_dense(source, config.trust_remote_code), config)
        return Request(folder, output, source, content, report, text, config, device)

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
        cache = cache_folder() if self.config.cache_dir is None else Path(self.config.cache_dir)
        return Teacher(
            lambda: self.teacher_model, self.content, self.config.top, cache / "targets", self.device
        )

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
            "data": batches_hash([self.text.learning, self.text.judging]),
            "settings": settings,
            "program": source_hash("dbf_compile"),
        }
        result: dict[str, Any] = json.loads(json.dumps(content))
        return result


def default_output(folder: str | Path) -> Path:
    """Return the folder that is written where none is named."""
    path = user_path(folder).absolute()
    return path.with_name(f"{path.name}-finetuned")


def _check_learns(model: Any, folder: Path) -> None:
    check_reads_tokens(model)
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


def _dense_of(folder: Path, report: Report | None, dense: str | Path | None) -> str | Path:
    """Return where the dense model is."""
    known = None if report is None else report.model.source
    if dense is None and known is None:
        raise OptionError(
            f"no dense model for {folder}, whose report names none",
            "the model that it was compressed from",
            "pass dense=..., on the command line --dense",
        )
    return known if dense is None else dense  # type: ignore[return-value]


def _check_content(content: str, report: Report | None, source: Path) -> None:
    expected = None if report is None else report.model.hash
    if expected not in (None, content):
        raise ConversionError(
            f"{source} as the dense model, whose content is another one than was compressed",
            "the model that the folder was compressed from",
            "pass dense=... with that model, on the command line --dense",
        )
