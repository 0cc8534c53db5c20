"""Registers the backend as soon as ``torch._dynamo`` is imported, without what compiling needs; sees what it traces.

torch loads the entry point of a backend at its first use and refuses a second registration: of several threads whose first
use comes at once, all but one fail. A backend that is registered already is not loaded.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, NoReturn
from weakref import WeakSet

from torch import nn

_log = logging.getLogger(__name__)

# Every use of torch.compile imports it first.
REGISTRY = "torch._dynamo.backends.registry"
TRACER = "torch._dynamo.symbolic_convert"
_UNSEEN = "this release of torch does not say what it is about to trace"
_named: WeakSet[nn.Module] = WeakSet()  # recurrent layers of which a warning has told


def dbf(*args: Any, **options: Any) -> Callable[..., Any]:
    """Compile a graph; see :func:`dbf_compile.compiler.backend.dbf`."""
    from dbf_compile.compiler import backend

    return backend.dbf(*args, **options)


def _reset() -> None:
    from dbf_compile.compiler import backend

    backend.dbf.reset()  # type: ignore[attr-defined]


dbf.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() calls it
dbf.watches_frames = True  # type: ignore[attr-defined]


def register() -> None:
    """Register the backend, unless torch has listed the entry points: it may be loading this one."""
    from torch._dynamo.backends import registry

    if "dbf" not in registry._BACKENDS:
        registry.register_backend(dbf, name="dbf")


def watch_frames() -> None:
    """See what Dynamo is about to trace for this backend, as some of it reaches no graph, where dense weights are used silently.

    Calls within ``torch.func.vmap`` and ``grad`` are traced, as they are for "eager". For any other backend Dynamo runs such a
    call as it is, and never again tries to compile that code; with Inductor this costs speed. Of ``jvp``, it traces nothing at
    all: a model with dense weights is refused. Recurrent layers, which it does not trace either, are named.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    refuse = getattr(InstructionTranslator, "_throw_if_in_functorch", None)
    if refuse is None:
        _log.warning("dbf: compiled code within torch.func's transforms may use dense weights: %s", _UNSEEN)
        return

    def look(self: Any) -> None:
        compiler: Any = self.output.compiler_fn
        compiler = inspect.getattr_static(compiler, "compiler_fn", compiler)
        if not getattr(compiler, "watches_frames", False):
            refuse(self)
            return
        models = list(_modules_read(self.f_code, self.f_locals, self.f_globals))
        if _within_jvp():
            _refuse_jvp(models)
        _name_untraced(models)

    InstructionTranslator._throw_if_in_functorch = look  # type: ignore[method-assign]


def _modules_read(code: CodeType, local: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[nn.Module]:
    for value in (*local.values(), *(names[name] for name in code.co_names if name in names)):
        owner = getattr(value, "__self__", value)  # of a bound method
        if isinstance(owner, nn.Module):
            yield owner


def _within_jvp() -> bool:
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters())


def _refuse_jvp(models: Iterable[nn.Module]) -> NoReturn:
    """Let a frame that reads these modules run as it is, this time: other frames that it calls are asked in turn.

    Raises:
        ConversionError: they have dense layers.
    """
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
    from torch._dynamo.exc import Unsupported

    from dbf_compile.candidates.dense import linears
    from dbf_compile.errors import ConversionError

    if any(map(linears, models)):
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


def _name_untraced(models: Iterable[nn.Module]) -> None:
    """Warn, once, of recurrent layers."""
    from torch._dynamo import config

    from dbf_compile.candidates.reasons import listed, other_matrices

    if config.allow_rnn:
        return
    for model in models:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.RNNBase)}
        new = {name: layer for name, layer in layers.items() if layer not in _named}
        if new:
            _named.update(new.values())
            matrices = {
                f"{name}.{kind}".lstrip("."): reason
                for name, layer in new.items()
                for kind, reason in other_matrices(layer).items()
            }
            _log.warning("dbf: left dense, as Dynamo does not trace them: %s", listed(matrices))
