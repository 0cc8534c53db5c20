"""Evaluation of a model: perplexity on text, distance from the dense model, tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dbf_compile.calibration.batches import windows_for
from dbf_compile.calibration.compare import compare
from dbf_compile.calibration.limits import checked, positions_of
from dbf_compile.calibration.model_io import check_reads_tokens, to_device
from dbf_compile.calibration.offload import offloaded
from dbf_compile.errors import OptionError
from dbf_compile.keywords import EvaluationKeywords
from dbf_compile.machine import chosen_device
from dbf_compile.options import EvaluationConfig
from dbf_compile.progress import over, say
from dbf_compile.records import resolve

Model = str | Path | nn.Module
_LENGTH = 2048  # tokens of a window, as usual in evaluations of perplexity


def evaluate(
    model: Model,
    data: str | Path | Iterable[Any] | None = None,
    *,
    dense: Model | None = None,
    tokenizer: Any = None,
    config: EvaluationConfig | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Any]:
    """Measure a model: perplexity and distance from the dense model on text, and tasks of lm-eval.

    Args:
        model: folder of a model, compressed or not, a GGUF file, its name on the Hub, or the model itself, which is left as it was.
        data: cut into windows that do not overlap; as for ``token_batches``. None: tasks alone.
        dense: the dense model, for KL and top-1 agreement.
        tokenizer: of the model; None for that of its folder.
        config: context length, windows, tasks, device.
        **options: fields of ``config`` as keywords, which win over it.

    Returns:
        With data: "context_length", "windows", "perplexity", "compressed" (nats a token), "measure"; with a dense model also
        "dense" (nats a token), "kl" (nats) and "top1_agreement". With tasks: their metrics by "task/metric".

    Raises:
        OptionError: neither data nor tasks; lm-eval is missing or does not know a task; an unknown or ill-typed option; a
            length that exceeds the model's positions.
        ConversionError: no model, no tokenizer, data that cannot be read, or too little of it.
    """
    settings = resolve(EvaluationConfig, config, options)
    if data is None and not settings.tasks:
        raise OptionError("neither data nor tasks", "one of them", "pass --data text.txt, or --tasks piqa")
    manager = None
    if settings.tasks:
        say("looking the tasks up in lm-eval", settings.progress)
        from dbf_compile.integrations import lm_eval

        manager = lm_eval.task_manager(settings.tasks, settings.include_path)
    say(f"opening {_name(model)}", settings.progress)
    from dbf_compile.integrations.bars import bars_of_transformers

    with bars_of_transformers(settings.progress):
        if tokenizer is None:
            tokenizer = _tokenizer_of(model, settings.trust_remote_code)
        # lm-eval puts the end-of-text token in front of what has nothing in front.
        if settings.tasks and tokenizer.eos_token_id is None:
            raise OptionError(
                f"tasks={list(settings.tasks)} with a tokenizer of {_name(model)} that has no end-of-text token",
                "a tokenizer with eos_token",
                "set eos_token in its tokenizer_config.json",
            )
        with _ready(model, settings) as opened:
            results = {} if data is None else _on_data(opened, dense, data, tokenizer, settings)
            if settings.tasks:
                positions = positions_of(opened)
                results |= lm_eval.run_tasks(opened, tokenizer, manager, settings, positions)
    return results


def _on_data(
    model: nn.Module, dense: Model | None, data: Any, tokenizer: Any, settings: EvaluationConfig
) -> dict[str, Any]:
    """Return perplexity, and the distance from the dense model."""
    check_reads_tokens(model)
    windows = windows_for(model, data, tokenizer, settings, _LENGTH, settings.windows)
    with ExitStack() as stack:
        other = None
        if dense is not None:
            say(f"opening {_name(dense)}", settings.progress)
            other = stack.enter_context(_ready(dense, settings))
            checked(other, windows)
        device = chosen_device(settings.device)
        batches = (
            to_device(batch, device) for batch in over(windows, "evaluating", "window", settings.progress)
        )
        measured = compare(other, model, batches)
    return {"context_length": windows[0]["input_ids"].shape[1], "windows": len(windows), **measured}


def evaluate_folder(
    model: str | Path,
    *,
    data: str | Path | None = None,
    dense: str | Path | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Any]:
    """Call :func:`evaluate`, under its former name; without data and tasks the result is empty."""
    if data is None and not options.get("tasks"):
        return {}
    return evaluate(model, data, dense=dense, **options)


def _tokenizer_of(model: Model, trust_remote_code: bool) -> Any:
    from dbf_compile.integrations import pretrained

    folder = None if isinstance(model, nn.Module) else pretrained.local_folder(model)
    return pretrained.tokenizer_of(folder, trust_remote_code)


@contextmanager
def _ready(model: Model, settings: EvaluationConfig) -> Iterator[nn.Module]:
    """Yield a model on the device in evaluation mode; one of the caller's is left as it was."""
    from dbf_compile.integrations import pretrained

    device: torch.device | None = chosen_device(settings.device)
    if not isinstance(model, nn.Module):
        folder = pretrained.local_folder(model)
        yield pretrained.open_any(folder, settings.trust_remote_code).to(device)
        return
    modes = {module: module.training for module in model.modules()}
    # Hooks of accelerate move what flows through a model, and load what lies on the CPU or on the disk.
    has_hooks = any(hasattr(module, "_hf_hook") for module in modes)
    try:
        with offloaded(model, [], None if has_hooks else device):
            yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
