"""What tests of whole models share."""

import pytest


@pytest.fixture
def unlowered(monkeypatch):
    """Record the graphs that Inductor would be given, and run them node by node instead: that takes a tenth of the time."""
    from dbf_compile.compiler import backend

    seen = []
    monkeypatch.setattr(backend.inductor, "compile_graph", lambda gm, *args: seen.append(gm) or gm)
    return seen
