"""The processes of bench_laptop: one for every variant, alive together, running one at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from laptop_sizes import FOLDER

_WORKER = Path(__file__).with_name("laptop_worker.py")
_LOG = FOLDER / "workers.log"
_CACHES = ("DBF_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class StoppedError(Exception):
    """The process of a variant has stopped."""

    def __init__(self, variant: str) -> None:
        super().__init__(f"{variant} has stopped: see {_LOG}")


class Processes:
    """Processes of the variants of one model.

    Args:
        model: name of the model.
        paths: folder or file of every variant.
        threads: of each process.
    """

    def __init__(self, model: str, paths: Mapping[str, Path], threads: int) -> None:
        self._model, self._paths, self._threads = model, paths, threads
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Processes:
        _LOG.parent.mkdir(parents=True, exist_ok=True)
        self._log = _LOG.open("w")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for variant, path in self._paths.items():
            command = _command(self._model, variant, path, self._threads)
            self._processes[variant] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            )
            self._answer(variant)

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            if process.stdin is not None:
                with suppress(OSError):  # what a process that has stopped did not read
                    process.stdin.close()
            process.terminate()
            process.wait()
        self._log.close()

    def run(self, variant: str, case: Mapping[str, int]) -> dict[str, Any]:
        """Let a variant run a case, and return its times.

        Raises:
            StoppedError: its process has stopped, now or before; the others go on.
        """
        process = self._processes[variant]
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise StoppedError(variant) from error
        return self._answer(variant)

    def _answer(self, variant: str) -> dict[str, Any]:
        pipe = self._processes[variant].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise StoppedError(variant)
        return dict(json.loads(line))


def first_token_seconds(model: str, variant: str, path: Path, threads: int) -> tuple[float, float]:
    """Return the seconds from the start of a process to its first token: with empty caches, and once more."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as place:
        own = Path(place, path.name)  # what is kept beside a model is not there either
        if path.is_dir():
            shutil.copytree(path, own)  # links would change what a start knows the files by
        else:
            own = path
        caches = {name: str(Path(place, name)) for name in _CACHES}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **caches}
        return _start(model, variant, own, threads, environment), _start(
            model, variant, own, threads, environment
        )


def _start(model: str, variant: str, path: Path, threads: int, environment: Mapping[str, str]) -> float:
    began = time.time()
    done = subprocess.run(
        [*_command(model, variant, path, threads), "--start"],
        capture_output=True,
        text=True,
        env=dict(environment),
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{variant} of {model} does not start: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["first_token_at"]) - began


def _command(model: str, variant: str, path: Path, threads: int) -> list[str]:
    return [sys.executable, str(_WORKER), model, variant, str(path), str(threads)]
