"""Compiles graphs with Inductor: its settings, our passes within it, the keys of its caches.

Private names of torch stand here and in ``dynamo.py`` and ``ir.py`` beside it, nowhere else. Proven on torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.backends.registry import lookup_backend as _lookup_backend
from torch._inductor import config, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
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
    users_pass = settings.get(_POST_GRAD_HOOK, getattr(config, _POST_GRAD_HOOK))
    patches = {**settings, _POST_GRAD_HOOK: _PostGradPass(fingerprint, post_grad_passes, users_pass)}
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


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
