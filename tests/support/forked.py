"""Processes that start at once: forks of one that has imported torch and transformers, which takes four seconds.

It has not imported this package, and has computed nothing. Tests about imports, memory or the command line start Python.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTED = [
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
]
IMPORTED += ["transformers.models.llama.modeling_llama", "transformers.integrations.accelerate"]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


class Forked:
    """A running program, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        code: the program.
        *arguments: ``sys.argv`` behind its name.
        environment: all of its variables; None for those of this process. Python's own are read no more.
        folder: where it runs; None for here.
        paths: folders in which it looks for modules first.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        paths: tuple[Path, ...] = (),
    ) -> None:
        self._texts = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._texts.name, name) for name in ("output", "errors")]
        variables = dict(os.environ if environment is None else environment)
        places = [str(folder or Path.cwd()), *map(str, self._outputs)]
        settings = (code, list(map(str, arguments)), variables, places, list(map(str, paths)))
        self._process = _FORKS.Process(target=_run, args=settings)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return the program's exit status and what it printed, once it has ended."""
        self._process.join()
        output, errors = (path.read_text() if path.exists() else "" for path in self._outputs)
        return subprocess.CompletedProcess("forked", self._process.exitcode or 0, output, errors)


def _run(
    code: str, arguments: list[str], variables: dict[str, str], places: list[str], paths: list[str]
) -> None:
    folder, *outputs = places
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[:0] = paths
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
