"""Options: defaults, patterns, and an error for every key and value that is not understood."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile.errors import OptionError
from dbf_compile.options import MAX_BITS, MIN_BITS, CompileOptions, CompressionConfig, parse

KINDS = (CompressionConfig, CompileOptions)
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]

# One value per field that is right, other than the default.
RIGHT: dict[str, Any] = {
    "bits_per_weight": 1,
    "overrides": {"*.down_proj": 3.0},
    "skip": ["*head"],
    "merge_shared_inputs": False,
    "preset": "fast",
    "iterations": 7,
    "seed": 3,
    "cache_dir": "/tmp/factors",
    "progress": False,
    "importance": {"layer": object()},
    "checkpoint": "/tmp/model.safetensors",
    "accuracy": "fast",
    "mode": "reduce-overhead",
    "inductor": {"max_autotune": True},
}
WRONG: dict[str, tuple[Any, ...]] = {
    "bits_per_weight": ("2", None, True, [2.0]),
    "overrides": (None, 2.0, [("a", 2.0)], {"a": "2"}, {1: 2.0}, {"a": True}),
    "skip": ("lm_head", None, [1], {"a": 1}),
    "merge_shared_inputs": (0, "yes", None),
    "preset": (None, 3, True),
    "iterations": (1.0, "7", True),
    "seed": (1.0, "7", False, None),
    "cache_dir": (3, ["a"], True),
    "progress": (1, "no", None),
    "importance": (None, [1], {1: object()}),
    "checkpoint": (3, b"a"),
    "accuracy": (None, 3, True),
    "mode": (3, True),
    "inductor": (None, "x", {1: 2}),
}


def test_every_field_has_its_examples() -> None:
    assert set(RIGHT) == set(WRONG) == {name for _, name in FIELDS}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_given_is_the_default(kind: type[CompressionConfig]) -> None:
    assert parse(kind, {}) == kind()


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_right_values_arrive(kind: type[CompressionConfig], name: str) -> None:
    parsed = parse(kind, {name: RIGHT[name]})
    wanted = tuple(RIGHT[name]) if name == "skip" else RIGHT[name]
    assert getattr(parsed, name) == wanted != getattr(kind(), name)
    assert parsed == dataclasses.replace(kind(), **{name: wanted})


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_wrong_types_are_refused_with_what_is_allowed(kind: type[CompressionConfig], name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(OptionError) as caught:
            parse(kind, {name: value})
        assert f"option {name}={value!r}" in str(caught.value)
        assert f"pass {name} as {caught.value.allowed}" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_with_the_known_ones(kind: type[CompressionConfig]) -> None:
    with pytest.raises(OptionError, match=r"unknown option 'colour'.*remove it") as caught:
        parse(kind, {"colour": "red"})
    assert caught.value.allowed == ", ".join(sorted(field.name for field in dataclasses.fields(kind)))


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_slip_of_the_pen_is_met_with_the_right_name(kind: type[CompressionConfig], name: str) -> None:
    with pytest.raises(OptionError, match=f"did you mean '{name}'"):
        parse(kind, {name[:-1]: RIGHT[name]})


def test_what_only_the_compiler_needs_is_unknown_to_the_compression() -> None:
    with pytest.raises(OptionError, match="unknown option 'checkpoint'"):
        parse(CompressionConfig, {"checkpoint": "x"})


def test_keys_need_not_be_strings_to_be_refused() -> None:
    with pytest.raises(OptionError, match="unknown option 3"):
        parse(CompressionConfig, {3: 1})  # type: ignore[dict-item]


def test_paths_become_strings() -> None:
    assert parse(CompileOptions, {"checkpoint": Path("/tmp/x")}).checkpoint == "/tmp/x"
    assert parse(CompileOptions, {"checkpoint": None}).checkpoint is None


@given(st.floats())
def test_bits_outside_their_range_are_refused_wherever_they_stand(bits: float) -> None:
    # An override may be called like the option itself: both are checked.
    for given_bits in (
        {"bits_per_weight": bits},
        {"overrides": {"*": bits}},
        {"overrides": {"bits_per_weight": bits}},
    ):
        if MIN_BITS <= bits <= MAX_BITS:
            parse(CompressionConfig, given_bits)
        else:
            with pytest.raises(OptionError, match=f"allowed: {MIN_BITS} to {MAX_BITS}"):
                parse(CompressionConfig, given_bits)
    if not MIN_BITS <= bits <= MAX_BITS:
        with pytest.raises(OptionError, match="bits per weight"):
            CompressionConfig(bits_per_weight=bits, overrides={"bits_per_weight": 2.0})


@pytest.mark.parametrize("iterations", [0, -1])
def test_iterations_below_one_are_refused(iterations: int) -> None:
    with pytest.raises(OptionError, match=f"iterations={iterations}; allowed: 1 or more"):
        CompressionConfig(iterations=iterations)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'fast', 'balanced', 'best'"):
        CompressionConfig(preset="slow")


def test_the_first_matching_override_wins() -> None:
    config = CompressionConfig(bits_per_weight=2.0, overrides={"*.down_proj": 3.0, "layers.0.*": 4.0})
    assert config.bits_for("layers.0.down_proj") == 3.0
    assert config.bits_for("layers.0.up_proj") == 4.0
    assert config.bits_for("layers.1.up_proj") == 2.0
    assert config.bits_for("layers.1.DOWN_PROJ") == 2.0  # case counts


def test_heads_stay_dense_unless_asked_for() -> None:
    assert CompressionConfig().skips("lm_head") and CompressionConfig().skips("model.lm_head")
    assert not CompressionConfig().skips("model.layers.0.mlp.up_proj")
    assert not CompressionConfig(skip=()).skips("lm_head")


@pytest.mark.parametrize("kind", KINDS)
def test_options_cannot_be_changed(kind: type[CompressionConfig]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().seed = 3  # type: ignore[misc]
