"""Registers the backend as soon as ``torch._dynamo`` is imported, without what compiling needs; lets it trace within transforms.

torch loads the entry point of a backend at its first use and refuses a second registration: of several threads whose first
use comes at once, all but one fail. A backend that is registered already is not loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# Every use of torch.compile imports it first.
REGISTRY = "torch._dynamo.backends.registry"
TRACER = "torch._dynamo.symbolic_convert"


def dbf(*args: Any, **options: Any) -> Callable[..., Any]:
    """Compile a graph; see :func:`dbf_compile.compiler.backend.dbf`."""
    from dbf_compile.compiler import backend

    return backend.dbf(*args, **options)


def _reset() -> None:
    from dbf_compile.compiler import backend

    backend.dbf.reset()  # type: ignore[attr-defined]


dbf.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it
dbf.traces_within_transforms = True  # type: ignore[attr-defined]


def register() -> None:
    """Register the backend, unless torch has listed the entry points: it may be loading this one."""
    from torch._dynamo.backends import registry

    if "dbf" not in registry._BACKENDS:
        registry.register_backend(dbf, name="dbf")


def trace_within_transforms() -> None:
    """Let Dynamo trace calls within ``torch.func.vmap`` and ``grad`` for this backend, as it does for "eager".

    For any other backend it runs such a call as it is, and never again tries to compile that code: with Inductor this costs
    speed, here models would silently compute with their dense weights. Of ``jvp``, Dynamo traces nothing at all: a model with
    dense weights is refused.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    refuse = getattr(InstructionTranslator, "_throw_if_in_functorch", None)
    if refuse is None:
        return

    def refuse_others(self: Any) -> None:
        compiler: Any = self.output.compiler_fn
        compiler = inspect.getattr_static(compiler, "compiler_fn", compiler)
        if not getattr(compiler, "traces_within_transforms", False):
            refuse(self)
        elif _within_jvp():
            read = (self.f_globals[name] for name in self.f_code.co_names if name in self.f_globals)
            _refuse_jvp([*self.f_locals.values(), *read])

    InstructionTranslator._throw_if_in_functorch = refuse_others  # type: ignore[method-assign]


def _within_jvp() -> bool:
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters())


def _refuse_jvp(values: Iterable[Any]) -> NoReturn:
    """Let a frame that reads these values run as it is, this time: other frames that it calls are asked in turn.

    Raises:
        ConversionError: there are dense layers among them.
    """
    from torch import nn
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
    from torch._dynamo.exc import Unsupported

    from dbf_compile.candidates.dense import linears
    from dbf_compile.errors import ConversionError

    owners = (getattr(value, "__self__", value) for value in values)
    if any(isinstance(owner, nn.Module) and linears(owner) for owner in owners):
        raise ConversionError(
            "compiled code called within torch.func.jvp, where Dynamo compiles nothing and dense weights would be used",
            "torch.func.jvp within the compiled function, or a converted model",
            "compile the function that calls torch.func.jvp, or call dbf_compile.convert_(model) first",
        )
    skipped = Unsupported(
        "compiled code called within torch.func.jvp", "Unsupported functorch tracing attempt"
    )
    skipped.frame_exec_strategy = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT)
    raise skipped
