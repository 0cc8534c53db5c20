"""Compiles graphs with Inductor: its settings, our passes within it, the keys of its caches.

Private names of torch stand here and in ``dynamo.py`` and ``ir.py`` beside it, nowhere else. Proven on torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.backends.registry import lookup_backend as _lookup_backend
from torch._inductor import config, list_mode_options, standalone_compile
from torch._inductor.codecache import torch_key
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.standalone_compile import AOTCompiledArtifact
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


def compile_artifact(
    gm: GraphModule,
    inputs: Sequence[Any],
    settings: Mapping[str, Any],
    fingerprint: str,
    post_grad_passes: Callable[[Graph], None],
) -> Callable[..., Any]:
    """Compile a graph as :func:`compile_graph` does, within a backend, to what :func:`artifact_bytes` can keep.

    Its callers pass inputs of the right sizes: they are not checked at every call.
    """
    patches = _patches({"size_asserts": False, **settings}, fingerprint, post_grad_passes)
    artifact: Any = standalone_compile(
        gm,
        list(inputs),
        dynamic_shapes="from_tracing_context",
        options={"config_patches": patches},
        aot=True,
    )
    return artifact  # type: ignore[no-any-return]


def artifact_bytes(artifact: Any) -> bytes:
    """Return what :func:`load_artifact` makes the artifact of again, in another process with the same torch."""
    content: bytes = artifact.serialize()
    return torch_key() + content


def load_artifact(content: bytes) -> Callable[..., Any] | None:
    """Return the artifact of :func:`artifact_bytes`, or None if another torch has written it."""
    key = torch_key()
    if not content.startswith(key):
        return None
    artifact: Any = AOTCompiledArtifact.deserialize(content.removeprefix(key))
    return artifact  # type: ignore[no-any-return]


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
