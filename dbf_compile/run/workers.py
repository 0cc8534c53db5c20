"""More workers are more processes that call ``compress`` with the same arguments."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle  # noqa: TID251  # of calls to our own processes, as the pool does it
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from dbf_compile.errors import CheckpointError, OptionError, ResumeError
from dbf_compile.files import user_path
from dbf_compile.machine import cores
from dbf_compile.options import CompressionConfig, CompressOptions
from dbf_compile.records import resolve
from dbf_compile.run.compress import Compressed, compress
from dbf_compile.run.output import check_output, work_folder
from dbf_compile.run.work import remove_work

_INTERRUPTED = 130  # exit status
_INPUTS = ("data", "batches", "tokenizer")


def compress_in_processes(
    model: str | Path,
    output: str | Path,
    *,
    processes: int,
    config: CompressionConfig | None = None,
    **arguments: Any,
) -> Compressed:
    """Call ``compress`` in several processes of this machine at once, which share the work and its cores.

    Args:
        model: folder or name of the model.
        output: the folder to write.
        processes: how many.
        config, **arguments: as for :func:`~dbf_compile.run.compress.compress`, ``data`` among them; the first process shows
            the progress, and ``workers`` counts for each.

    Returns:
        What ``compress`` returns.

    Raises:
        OptionError: an argument that cannot be sent to another process.
        ResumeError: a process was ended from outside.
        CheckpointError: the processes cannot be started.
    """
    _check_count("processes", processes)
    settings, inputs = _settings(arguments, config, max(1, cores() // processes))
    if settings.resume == "never":
        remove_work(work_folder(user_path(output)))
        settings = _begun(settings)
    quiet = replace(settings, progress=False)
    first, other = (
        _packed(partial(compress, model, output, config=one, **inputs)) for one in (settings, quiet)
    )
    try:
        with ExitStack() as stack:
            stack.enter_context(_ended_on_interrupt())
            calls = _started(stack, [first, *[other] * (processes - 1)])
            results = [call.result() for call in calls]  # all of them: an error of any is raised
    except BrokenProcessPool as error:
        raise ResumeError(
            f"{output}: one of {processes} processes was ended from outside",
            "memory for a model in each",
            "compress again, with fewer processes: what is done is kept",
        ) from error
    return results[0]


def _started(stack: ExitStack, calls: Sequence[bytes]) -> list[Future[Compressed]]:
    """Start a process for each call; the stack ends them."""
    try:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(len(calls), mp_context=context, initializer=_end_with_parent)
        stack.enter_context(pool)
        return [pool.submit(_call, call) for call in calls]
    except OSError as error:
        raise CheckpointError(
            f"{len(calls)} processes that cannot be started ({error})",
            "some kilobytes free in /dev/shm, and leave to start processes",
            "make room there, or compress with processes=1",
        ) from error


@contextmanager
def _ended_on_interrupt() -> Iterator[None]:
    """End the processes that were started in the block when it is interrupted: the pool would wait for them."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except KeyboardInterrupt:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise


def _end_with_parent() -> None:
    """Let this process end at once when it is interrupted, or when the one that started it is no more.

    What it has done is whole, and what it has not is done by the next run.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(_INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def compress_on_ray(
    model: str | Path,
    output: str | Path,
    *,
    tasks: int,
    cpus: float = 1,
    gpus: float = 0,
    config: CompressionConfig | None = None,
    **arguments: Any,
) -> Compressed:
    """Call ``compress`` in several tasks of a Ray cluster at once; they share the work through the output's folder.

    A task that is lost with its machine is started again, by Ray. The work goes on as long as one is left.

    Args:
        model: folder or name of the model, as every machine sees it.
        output: the folder to write, on a file system that every machine sees.
        tasks: how many.
        cpus: cores of each task.
        gpus: GPUs of each task.
        config, **arguments: as for :func:`~dbf_compile.run.compress.compress`, ``data`` among them.

    Returns:
        What ``compress`` returns.

    Raises:
        OptionError: Ray is not installed, or a machine does not see what another has written beside the output.
        ResumeError: all tasks were lost.
        Exception: any other error of ``compress``.
    """
    _check_count("tasks", tasks)
    try:
        from dbf_compile.integrations import ray
    except ImportError as error:
        raise OptionError(
            f"tasks={tasks} without Ray ({error})", "Ray installed", "pip install 'dbf-compile[ray]'"
        ) from error
    output = user_path(output).absolute()
    settings, inputs = _settings({"progress": False, **arguments}, config, max(1, int(cpus)))
    mark = ray.first_result(partial(_begin, output, settings.resume == "never"), 1, cpus, gpus)
    settings = _begun(settings)
    call = partial(compress, model, output, config=settings, **inputs)
    result: Compressed = ray.first_result(
        partial(_where_marked, mark, output, Path.cwd(), call), tasks, cpus, gpus
    )
    return result


def _begin(output: Path, start_over: bool) -> tuple[Path, str]:
    """Leave a mark where the work is kept, and return it with this machine's name.

    Called on one of the machines that will work: the driver's may not have the folder.

    Args:
        output: the folder to write.
        start_over: remove what is there before.
    """
    check_output(output)
    work = work_folder(output)
    if start_over:
        remove_work(work)
    mark = work / "marks" / uuid4().hex
    if not output.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return mark, platform.node()


def _where_marked(
    mark: tuple[Path, str], output: Path, folder: Path, call: Callable[[], Compressed]
) -> Compressed:
    """Call ``call`` with the driver's working folder, on a machine that sees the mark or what it stood for.

    Raises:
        OptionError: this machine sees other files.
    """
    path, machine = mark
    if not (path.exists() or output.exists()):
        raise OptionError(
            f"output {output} on {platform.node()}, which does not see what {machine} wrote beside it",
            "a place on a file system that all machines of the cluster share",
            "mount one on each, and choose an output there",
        )
    with contextlib.chdir(folder) if folder.is_dir() else nullcontext():
        return call()


def _packed(call: partial[Compressed]) -> bytes:
    """Return a call as bytes that go through a pipe: the pool would put tensors into shared memory, often a small disk."""
    try:
        return pickle.dumps(call)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise OptionError(
            f"an argument that cannot be sent to another process ({error})",
            "paths, texts, rows, batches of tensors and modules whose class a module defines",
            "pass the folder of a model and the path of its data, or use processes=1",
        ) from error


def _call(packed: bytes) -> Compressed:
    compressed: Compressed = pickle.loads(packed)()
    return compressed


def _settings(
    arguments: Mapping[str, Any], config: CompressionConfig | None, workers: int
) -> tuple[CompressOptions, dict[str, Any]]:
    """Return the options of every worker, and the arguments of ``compress`` that are no options."""
    inputs = {name: value for name, value in arguments.items() if name in _INPUTS}
    options = {name: value for name, value in arguments.items() if name not in _INPUTS}
    settings = resolve(CompressOptions, config, options)
    return replace(settings, workers=settings.workers or workers), inputs


def _begun(settings: CompressOptions) -> CompressOptions:
    """Return the options for workers where what was there is removed: one that did so again would remove what others are doing."""
    return replace(settings, resume="auto") if settings.resume == "never" else settings


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise OptionError(f"{name}={count}", "1 or more", f"choose {name} for the cores that are there")
