"""The entry point: it is found, says what does not fit, and breaks nothing."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

import pytest

from dbf_compile.integrations.vllm import plugin


def test_vllm_finds_the_plugin() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="dbf")
    assert entry.load() is plugin.register


def test_an_engine_that_it_does_not_fit_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)  # an import fails
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "cannot be served by this vLLM" in caplog.text


def test_it_registers_the_method_and_may_do_so_twice() -> None:
    quantization = pytest.importorskip("vllm.model_executor.layers.quantization")
    plugin.register()
    plugin.register()
    assert quantization.QUANTIZATION_METHODS.count("dbf") == 1
    assert quantization.get_quantization_config("dbf").__name__ == "VLLMConfig"
