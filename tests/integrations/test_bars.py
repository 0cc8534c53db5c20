"""The bars of other libraries: silent inside the block alone."""

from __future__ import annotations

import sys

import pytest

from dbf_compile.integrations.bars import bars_of_lm_eval, bars_of_transformers

pytest.importorskip("transformers")


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_transformers_are_as_before_afterwards(
    enabled: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", enabled)
    with pytest.raises(KeyError), bars_of_transformers(shown):
        assert logging.is_progress_bar_enabled() == (enabled and shown)
        raise KeyError
    assert logging.is_progress_bar_enabled() == enabled


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_lm_eval_go_nowhere(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with bars_of_lm_eval(shown):
        print("bar", file=sys.stderr)
    assert capsys.readouterr().err == ("bar\n" if shown else "")
