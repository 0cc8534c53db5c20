"""Compilation with Inductor: settings are checked, the user's passes run before ours, and caches know both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import config
from torch.fx import Graph, symbolic_trace

from dbf_compile.compiler import inductor
from dbf_compile.errors import OptionError


def compiled(passes: list[str], **settings: Any) -> Any:
    """Compile 2 x + 1; our pass adds "ours" to ``passes``."""
    gm = symbolic_trace(lambda x: 2 * x + 1)
    return inductor.compile_graph(
        gm, [torch.ones(3)], settings, "fingerprint", lambda graph: passes.append("ours")
    )


def test_the_users_passes_run_before_ours() -> None:
    passes: list[str] = []

    def users(graph: Graph) -> None:
        passes.append("user's")

    with torch.no_grad(), config.patch(fx_graph_cache=False):
        y = compiled(passes, post_grad_custom_post_pass=users)(torch.ones(3))
        assert torch.equal(y, torch.full((3,), 3.0))
    assert passes == ["user's", "ours"]
    assert config.post_grad_custom_post_pass is None  # a patch, no assignment


class Named:
    def __init__(self, name: str | None) -> None:
        self.name = name

    def uuid(self) -> str | None:
        return self.name


def uuid(fingerprint: str = "a", users_pass: Any = None) -> Any:
    return inductor._PostGradPass(fingerprint, lambda graph: None, users_pass).uuid()


def test_caches_tell_fingerprints_and_the_users_passes_apart() -> None:
    keys = [uuid(), uuid("b"), uuid(users_pass=Named("one")), uuid(users_pass=[Named("one"), Named("two")])]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert uuid() == uuid()
    # A pass without an identity bypasses the caches.
    assert uuid(users_pass=Named(None)) is None
    assert uuid(users_pass=lambda graph: None) is None


def test_modes_are_those_of_torch_compile() -> None:
    assert inductor.mode_settings(None) == {}
    assert inductor.mode_settings("max-autotune")["max_autotune"] is True
    with pytest.raises(OptionError, match=r"mode='fastest'; allowed: default, .*max-autotune"):
        inductor.mode_settings("fastest")


def test_settings_must_be_inductors() -> None:
    inductor.check_settings({})
    inductor.check_settings({"epilogue_fusion": False})
    with pytest.raises(OptionError, match="unknown setting 'no_such_setting'"):
        inductor.check_settings({"epilogue_fusion": False, "no_such_setting": 1})
