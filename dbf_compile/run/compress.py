"""``compress``: from a pretrained model to a folder that loads like any other of transformers.

The steps are those of :class:`~dbf_compile.run.steps.Run`. More workers are more processes that call ``compress`` with the same
arguments.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbf_compile.errors import DBFError
from dbf_compile.machine import cores, default_workers
from dbf_compile.options import CompressOptions, parse
from dbf_compile.run.report import report_of
from dbf_compile.run.steps import Run


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made.

    Attributes:
        folder: the model, for ``from_pretrained``.
        report: the content of ``dbf_report.json``.
    """

    folder: Path
    report: Mapping[str, Any]

    def __str__(self) -> str:
        bits, covered = self.report["bits"], self.report["coverage"]["share"]
        lines = [
            f"{self.folder}: {bits['factored']:.3f} bits per weight in {covered:.1%} of the weights, "
            f"{bits['file']:.3f} in the whole file"
        ]
        found = self.report.get("evaluation") or {}
        if "kl" in found:
            lines.append(
                f"{found['measure']}: KL {found['kl']:.4f}, top-1 agreement {found['top1_agreement']:.1%}"
            )
        if "compressed" in found and "dense" in found:
            lines.append(f"dense {found['dense']:.4f}, compressed {found['compressed']:.4f} nats a token")
        if "error" in found:
            lines.append(f"{found['measure']}: {found['error']:.4f}")
        return "\n".join(lines)


def compress(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    bits: float = 2.0,
    data: str | Path | Iterable[Any] | None = None,
    batches: Sequence[Any] | None = None,
    tokenizer: Any = None,
    resume: str = "auto",
    workers: int | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    keep_work: bool = False,
    **options: Any,
) -> Compressed:
    """Compress a pretrained model of transformers into a folder for ``from_pretrained``.

    Results are kept in ``<output>.work`` as they come: a run that was stopped goes on where it was, with the same result
    as if it had not been. Other processes that call ``compress`` with the same arguments, at the same time, on any machine
    that sees the folder, share the work; ranks of torchrun do.

    Args:
        model: the folder of a model, its name on the Hub, or the model itself.
        output: the folder to write; it does not exist yet.
        bits: stored bits per weight of the factored layers, scales and padding counted.
        data: text to calibrate with: path of a file, texts, or rows of a dataset; see ``token_batches``. None, and no
            ``batches``: random tokens, which is worse.
        batches: ready batches in place of text, for models that read something else.
        tokenizer: for ``data``; None for that of the model's folder.
        resume: "auto", "required" or "never"; see :class:`~dbf_compile.run.work.Work`.
        workers: weights that this process factors at a time; None for one a core, or a GPU.
        device: where to compute; blocks visit it one at a time. None for a GPU where there is one.
        trust_remote_code: as of ``from_pretrained``.
        keep_work: leave ``<output>.work`` there at the end.
        **options: fields of :class:`~dbf_compile.options.CompressOptions`.

    Returns:
        The folder and its report.

    Raises:
        OptionError, ConversionError: something was asked for that cannot be done.
        ResumeError: the work that is there belongs to other arguments.
        CheckpointError: the model's files are damaged, or results cannot be written.
    """
    config = parse(CompressOptions, {"bits_per_weight": bits, **options})
    output = Path(output)
    run = Run.opened(model, output, config, data, batches, tokenizer, resume, device, trust_remote_code)
    if run is not None:
        threads = torch.get_num_threads()
        try:
            # Sums depend on the number of threads; so that results do not, it is the same for all workers.
            torch.set_num_threads(cores())
            run.finish(workers or default_workers(run.device))
        except (OSError, DBFError):
            if not output.exists():  # else another worker has finished, and removed the work under this one
                raise
        finally:
            torch.set_num_threads(threads)
        if not keep_work:
            run.work.remove()
    return Compressed(output, report_of(output))


def compress_in_processes(
    model: str | Path, output: str | Path, *, processes: int, progress: bool = True, **options: Any
) -> Compressed:
    """Call ``compress`` in several processes of this machine at once, which share the work and its cores.

    Args:
        model: folder or name of the model.
        output: the folder to write.
        processes: how many.
        progress: show the progress of the first.
        **options: further arguments of :func:`compress`.

    Returns:
        What ``compress`` returns.
    """
    workers = max(1, cores() // processes)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.submit(
                compress, model, output, **{"workers": workers, **options, "progress": progress and not rank}
            )
            for rank in range(processes)
        ]
        made = [task.result() for task in tasks]
        return made[0]
