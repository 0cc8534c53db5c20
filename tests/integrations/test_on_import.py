"""An action runs when a module is imported, and does not import it."""

import subprocess
import sys

import pytest

from dbf_compile.integrations.on_import import when_imported


def test_a_module_that_is_imported_already_counts_at_once():
    seen = []
    when_imported("json", lambda: seen.append(1))
    assert seen == [1]


def test_the_action_comes_once_right_after_the_module(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    before = list(sys.meta_path)
    when_imported("late_module", lambda: seen.append(sys.modules["late_module"].value))
    assert seen == []
    import late_module

    assert seen == [7] and sys.meta_path == before
    del sys.modules["late_module"]
    import late_module  # noqa: F401, F811

    assert seen == [7]


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_transformers_learns_the_method_in_either_order_and_is_not_imported_for_it():
    registered = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('dbf' in m)"
    imported = "print('transformers' in sys.modules)"
    assert run(f"import dbf_compile, sys; {imported}; {registered}") == "False\nTrue"
    assert run(f"import transformers.quantizers.auto, dbf_compile; {registered}") == "True"
