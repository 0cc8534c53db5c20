"""Registers the backend as soon as ``torch._dynamo`` is imported, without what compiling needs.

torch loads the entry point of a backend at its first use and refuses a second registration: of several threads whose first
use comes at once, all but one fail. A backend that is registered already is not loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Every use of torch.compile imports it first.
REGISTRY = "torch._dynamo.backends.registry"


def dbf(*args: Any, **options: Any) -> Callable[..., Any]:
    """Compile a graph; see :func:`dbf_compile.compiler.backend.dbf`."""
    from dbf_compile.compiler import backend

    return backend.dbf(*args, **options)


def _reset() -> None:
    from dbf_compile.compiler import backend

    backend.dbf.reset()  # type: ignore[attr-defined]


dbf.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def register() -> None:
    """Register the backend, unless torch has listed the entry points: it may be loading this one."""
    from torch._dynamo.backends import registry

    if "dbf" not in registry._BACKENDS:
        registry.register_backend(dbf, name="dbf")
