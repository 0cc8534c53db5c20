"""Models opened by transformers, and what it says of them in our words."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import transformers

from dbf_compile.errors import CheckpointError, ConversionError
from dbf_compile.integrations.opening import model_class, refuse_others, unreadable


def test_tensors_that_are_made_up_or_left_out_are_named() -> None:
    whole: dict[str, object] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    refuse_others("it", whole, CheckpointError)
    for change, message in (
        ({"missing_keys": {"b", "a"}}, "missing: a, b"),
        ({"unexpected_keys": ["x"]}, "left over: x"),
        ({"mismatched_keys": [("w", (1, 2), (2, 1))]}, r"of another shape: w \(1, 2\), not \(2, 1\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            refuse_others("it", whole | change, CheckpointError)


def test_errors_of_transformers_say_what_to_do() -> None:
    assert isinstance(unreadable("it", ImportError("einops")), ConversionError)
    assert "pass trust_remote_code=True" in str(unreadable("it", ValueError("set trust_remote_code")))
    assert "download it again" in str(unreadable("it", RuntimeError("broken")))
    for error, do in (
        (ValueError("Transformers does not recognize this architecture"), "update transformers"),
        (PermissionError(13, "Permission denied"), "check who may read"),
        (MemoryError(), "free memory"),
        (RuntimeError("CUDA out of memory"), "free memory"),
    ):
        message = str(unreadable("it", error))
        assert do in message and "damaged" not in message


def test_the_class_of_a_configuration() -> None:
    config = transformers.LlamaConfig(architectures=["LlamaModel"])
    assert model_class(config) is transformers.LlamaModel
    config.architectures = None
    assert model_class(config) is transformers.AutoModelForCausalLM
