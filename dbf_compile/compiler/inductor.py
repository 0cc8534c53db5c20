"""Compiles graphs with Inductor: its settings, our passes within it, the keys of its caches.

Private names of torch stand here and in ``dynamo``, ``ir``, ``programs`` and ``registration`` beside it, nowhere else. Proven on torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch._dynamo.backends.registry import lookup_backend as _lookup_backend
from torch._guards import TracingContext, tracing
from torch._inductor import config, list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_aot
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule

from dbf_compile.errors import OptionError

_POST_GRAD_HOOK = "post_grad_custom_post_pass"


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    settings: Mapping[str, Any],
    fingerprint: str,
    post_grad_passes: Callable[[Graph], None],
) -> Callable[..., Any]:
    """Compile a graph with Inductor.

    Args:
        gm: a Dynamo graph.
        inputs: example inputs in the order of its placeholders.
        settings: Inductor's settings for this compilation only.
        fingerprint: part of the keys of Inductor's caches.
        post_grad_passes: rewrites, in place, the graph that Inductor is about to lower.

    Returns:
        The compiled graph.
    """
    patches = _patches(settings, fingerprint, post_grad_passes)
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def _patches(
    settings: Mapping[str, Any], fingerprint: str, post_grad_passes: Callable[[Graph], None]
) -> dict[str, Any]:
    users_pass = settings.get(_POST_GRAD_HOOK, getattr(config, _POST_GRAD_HOOK))
    return {**settings, _POST_GRAD_HOOK: _PostGradPass(fingerprint, post_grad_passes, users_pass)}


def compile_library(
    gm: GraphModule,
    inputs: Sequence[Any],
    fingerprint: str,
    post_grad_passes: Callable[[Graph], None],
    c_functions: Sequence[OpOverload],
) -> Path:
    """Compile a graph, within a backend, ahead of time: to a library that is called without Inductor and Python.

    Args:
        gm: a Dynamo graph; its inputs are tensors.
        inputs: fake tensors in the order of its placeholders, of the mode that Dynamo traced in.
        fingerprint: as of :func:`compile_graph`.
        post_grad_passes: as of :func:`compile_graph`.
        c_functions: operators, overloads named ``out``, that the program calls as C functions of loaded libraries:
            ``aoti_torch_cpu_`` and their name. It calls others by torch's dispatcher.

    Returns:
        The library, in Inductor's cache. A file of its name and ``.json`` beside it names operators for the dispatcher.
    """
    patches = _patches({}, fingerprint, post_grad_passes)
    patches["aot_inductor.custom_ops_to_c_shims"] = {op: [_declaration(op)] for op in c_functions}
    # Of what calls the kernels, not of the kernels: half the seconds of g++, and programs as fast.
    patches["aot_inductor.compile_wrapper_opt_level"] = "O0"
    patches["cpp.dynamic_threads"] = True  # torch's threads are those of the process that runs it
    if hasattr(config.aot_inductor, "enable_line_tables"):  # not in torch 2.11
        patches["aot_inductor.enable_line_tables"] = False
    # Dynamo traces under one fake mode and compiles under another, and ahead of time there may be but one.
    mode = next(item.fake_mode for item in inputs if isinstance(item, FakeTensor))
    with tracing(TracingContext(mode)):
        return Path(str(compile_fx_aot(gm, list(inputs), config_patches=patches)))


_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "int": "int64_t",
    "float": "double",
    "bool": "int32_t",
}


def _declaration(op: OpOverload) -> str:
    """Return the C function that Inductor calls for an operator whose overload is named ``out``: ``out`` comes first."""
    arguments = sorted(op._schema.arguments, key=lambda argument: not argument.is_out)
    types = ", ".join(_C_TYPES[str(argument.type)] for argument in arguments)
    return f"AOTITorchError aoti_torch_cpu_{op._opname}({types})"


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Return Inductor's settings for a mode of ``torch.compile``.

    Raises:
        OptionError: an unknown mode.
    """
    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise OptionError(f"mode={mode!r}", ", ".join(sorted(modes)), "leave it out for the default")
    return dict(modes[mode]) if mode is not None else {}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise OptionError if Inductor has no setting of one of these names."""
    allowed = config.get_config_copy() if settings else {}
    for name in settings:
        if name not in allowed:
            raise OptionError(
                f"unknown setting {name!r} in option 'inductor'",
                "the names in torch._inductor.config",
                "see torch._inductor.list_options()",
            )


def reset() -> None:
    """Drop what Inductor keeps between compilations, such as CUDA graphs."""
    backend = _lookup_backend("inductor")
    if hasattr(backend, "reset"):
        backend.reset()


class _PostGradPass(CustomGraphPass):
    """The user's passes, then ours. ``uuid()`` is part of the keys of Inductor's caches, as custom lowerings are not."""

    def __init__(self, fingerprint: str, passes: Callable[[Graph], None], users_pass: Any) -> None:
        self._fingerprint, self._passes = fingerprint, passes
        if users_pass is None:
            self._users_passes: tuple[Any, ...] = ()
        elif isinstance(users_pass, (list, tuple)):  # since torch 2.13
            self._users_passes = tuple(users_pass)
        else:
            self._users_passes = (users_pass,)

    def __call__(self, graph: Graph) -> None:
        for users_pass in self._users_passes:
            users_pass(graph)
        self._passes(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        identities = [getattr(users_pass, "uuid", lambda: None)() for users_pass in self._users_passes]
        # torch's rule: a pass without an identity bypasses the caches.
        return None if None in identities else ("dbf_compile", self._fingerprint, *identities)
