"""Options: defaults, patterns, one style of calling, and an error for every key and value that is not understood."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbf_compile import keywords
from dbf_compile.errors import OptionError
from dbf_compile.options import (
    MAX_BITS,
    MIN_BITS,
    AllocationConfig,
    CalibrationConfig,
    CompileOptions,
    CompressionConfig,
    CompressOptions,
    EvaluationConfig,
    FinetuneConfig,
    Sampling,
)
from dbf_compile.records import ALIASES, Record, describe, parse, resolve

KINDS: tuple[type[Record], ...] = (
    CompressionConfig,
    AllocationConfig,
    CompileOptions,
    CompressOptions,
    CalibrationConfig,
    EvaluationConfig,
    FinetuneConfig,
    Sampling,
)
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]
KEYWORDS = {
    CompressionConfig: keywords.CompressionKeywords,
    AllocationConfig: keywords.AllocationKeywords,
    CompressOptions: keywords.CompressKeywords,
    CalibrationConfig: keywords.CalibrationKeywords,
    EvaluationConfig: keywords.EvaluationKeywords,
    FinetuneConfig: keywords.FinetuneKeywords,
    Sampling: keywords.SamplingKeywords,
}

# By field, or by (record, field) where two records differ: a right value other than the default, and wrong types.
TRUTH = (False, (0, "yes", None))
COUNT = (7, (1.0, "7", True, None))
MAYBE_COUNT = (7, (1.0, "7", True))
PATH = ("/tmp/here", (3, ["a"], True))
DEVICE = ("cpu", (3, True, ["cuda"]))
SHARE = (0.5, ("0.5", True, [0.5]))
EXAMPLES: dict[Any, tuple[Any, tuple[Any, ...]]] = {
    "bits_per_weight": (1, ("2", None, True, [2.0])),
    "overrides": ({"*.down_proj": 3.0}, (None, 2.0, [("a", 2.0)], {"a": "2"}, {1: 2.0}, {"a": True})),
    "head": ("int4", (None, [4], {"a": 1}, True)),
    "embedding": ("int6", (None, 4.0, ["int4"])),
    "skip": (["*head"], ("lm_head", None, [1], {"a": 1})),
    **dict.fromkeys(("tokens", "batch", "judge", "top"), COUNT),
    **dict.fromkeys(("sign_rate", "scale_rate", "norm_rate", "hidden"), (2, ("2", None, True))),
    "merge_shared_inputs": TRUTH,
    "preset": ("fast", (None, 3, True)),
    "iterations": MAYBE_COUNT,
    "seed": COUNT,
    "cache_dir": PATH,
    "progress": TRUTH,
    "importance": ({"layer": object()}, (None, [1], {1: object()})),
    "checkpoint": PATH,
    "accuracy": ("fast", (None, 3, True)),
    "mode": ("independent", (None, 3, True)),
    (CompileOptions, "mode"): ("reduce-overhead", (3, True)),
    "inductor": ({"max_autotune": True}, (None, "x", {1: 2})),
    "multiple": COUNT,
    "floor": SHARE,
    "ceiling": SHARE,
    "depth_prior": (0.6, ("0.6", None, True)),
    "length": MAYBE_COUNT,
    "windows": COUNT,
    (CompressOptions, "windows"): MAYBE_COUNT,
    "shares": ({"code": 2.0}, (None, 2.0, {"code": "2"}, {1: 2.0})),
    "own_text": SHARE,
    "own_temperature": (0.5, ("0.5", None, True)),
    "own_top_k": COUNT,
    "column": PATH,
    "split": PATH,
    "holdout": COUNT,
    "curvature": ("kronecker", (None, 3, True)),
    "temper": SHARE,
    "budget": ("allocated", (None, 3)),
    "tune": MAYBE_COUNT,
    "refine": MAYBE_COUNT,
    "distill": MAYBE_COUNT,
    "max_shard_size": COUNT,
    "resume": ("never", (None, 3)),
    "workers": MAYBE_COUNT,
    "device": DEVICE,
    "trust_remote_code": (True, (0, "yes", None)),
    "keep_work": (True, (0, "yes", None)),
    "loss": ("sampled", (3, ["sampled"])),
    "layers": (["*proj"], ("*", None, [1])),
    "clip": (0.999, ("0.9", True)),
    "tasks": (["piqa"], ("piqa", None, [1])),
    "include_path": PATH,
    "limit": SHARE,
    "update_report": (True, (0, "yes", None)),
    "do_sample": (True, (0, "yes")),
    "temperature": SHARE,
    "top_k": MAYBE_COUNT,
    "top_p": SHARE,
    "min_p": SHARE,
    "repetition_penalty": SHARE,
    (Sampling, "seed"): MAYBE_COUNT,
}
LISTS = ("skip", "layers", "tasks")


def examples(kind: type[Record], name: str) -> tuple[Any, tuple[Any, ...]]:
    return EXAMPLES.get((kind, name), EXAMPLES.get(name, (None, ())))


def test_every_field_has_its_examples() -> None:
    assert {name for _, name in FIELDS} == {name for name in EXAMPLES if isinstance(name, str)}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_given_is_the_default(kind: type[Record]) -> None:
    assert parse(kind, {}) == kind() == resolve(kind, None, {})


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_right_values_arrive(kind: type[Record], name: str) -> None:
    right = examples(kind, name)[0]
    expected = tuple(right) if name in LISTS else right
    for record in (
        parse(kind, {name: right}),
        kind(**{name: right}),
        dataclasses.replace(kind(), **{name: right}),
        resolve(kind, kind(), {name: right}),
    ):
        assert getattr(record, name) == expected != getattr(kind(), name)
        assert record == dataclasses.replace(kind(), **{name: expected})


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_wrong_types_are_refused_however_the_record_is_made(kind: type[Record], name: str) -> None:
    ways = (
        lambda value: parse(kind, {name: value}),
        lambda value: kind(**{name: value}),
        lambda value: dataclasses.replace(kind(), **{name: value}),
        lambda value: resolve(kind, kind(), {name: value}),
    )
    for value in examples(kind, name)[1]:
        for way in ways:
            with pytest.raises(OptionError) as caught:
                way(value)
            assert f"option {name}={value!r}" in str(caught.value)
            assert f"pass {name} as {caught.value.allowed}" in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_strings_and_numbers_outside_their_range_are_refused(kind: type[Record], name: str) -> None:
    limits = next(field.metadata for field in dataclasses.fields(kind) if field.name == name)
    outside = [limits["low"] - 1] if limits.get("low") is not None else []
    outside += [limits["high"] + 1] if limits.get("high") is not None else []
    outside += ["nonsense"] if limits.get("choices") else []
    for value in outside:
        with pytest.raises(OptionError, match=f"{name}=.*allowed: .*leave {name} out"):
            kind(**{name: value})


@pytest.mark.parametrize("kind", KEYWORDS)
def test_keywords_mirror_the_fields_of_their_record(kind: type[Record]) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    aliases = {alias for alias, name in ALIASES.items() if name in names}
    assert set(KEYWORDS[kind].__annotations__) == names | aliases


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_help_text(kind: type[Record]) -> None:
    described = describe(kind)
    assert [item.name for item in described] == [field.name for field in dataclasses.fields(kind)]
    assert all(item.help.endswith(".") or item.help[-1].isalnum() for item in described), described
    assert {item.name: item.default for item in described} == {
        field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)
    }


def test_bits_is_short_for_bits_per_weight() -> None:
    assert parse(CompileOptions, {"bits": 3.0}).bits_per_weight == 3.0
    assert parse(CompressOptions, {"form": "input"}).curvature == "input"
    assert (
        resolve(CompressionConfig, CompressionConfig(bits_per_weight=3.0), {"bits": 1.0}).bits_per_weight == 1
    )
    with pytest.raises(OptionError, match="'bits_per_weight' in two spellings"):
        parse(CompressionConfig, {"bits": 2.0, "bits_per_weight": 3.0})
    with pytest.raises(OptionError, match="unknown option 'bits'"):
        parse(CalibrationConfig, {"bits": 2.0})


def test_other_spellings_serve_in_constructors_too() -> None:
    assert CompressionConfig(bits=3.0).bits_per_weight == 3.0  # type: ignore[call-arg]
    config = CompressOptions(form="input")  # type: ignore[call-arg]
    assert config.curvature == config.form == "input"
    assert dataclasses.replace(config, curvature="kronecker").form == "kronecker"
    with pytest.raises(OptionError, match="'curvature' in two spellings"):
        CompressOptions(form="input", curvature="input")  # type: ignore[call-arg]


def test_records_of_a_user_may_add_fields_of_any_type() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(CompressionConfig):
        notes: list[str] = dataclasses.field(default_factory=list)

    assert resolve(CompressionConfig, Own(notes=["a"], seed=3), {}).seed == 3


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (CompileOptions, CompressOptions(bits_per_weight=4.0)),
        (CompressOptions, CompileOptions(bits_per_weight=4.0)),
    ],
)
def test_of_another_record_the_fields_of_the_common_base_count(kind: type[Record], config: Record) -> None:
    # Both have a mode, and mean different things by it.
    assert resolve(kind, config, {}) == kind(bits_per_weight=4.0)
    with pytest.raises(OptionError, match="config of type EvaluationConfig"):
        resolve(kind, EvaluationConfig(), {})


def test_block_is_an_alias_of_sequential() -> None:
    assert CompressOptions(mode="block") == CompressOptions(mode="sequential")


def test_keywords_win_over_the_config_and_other_records_serve_as_one() -> None:
    config = CompressOptions(bits_per_weight=1.5, seed=3, mode="independent")
    assert resolve(AllocationConfig, config, {"seed": 4}) == AllocationConfig(bits_per_weight=1.5, seed=4)
    with pytest.raises(OptionError, match="config of type dict"):
        resolve(CompressionConfig, {"bits": 2.0}, {})  # type: ignore[arg-type]


def test_only_what_changes_results_is_part_of_the_fingerprint() -> None:
    kept = set(CompressOptions().result_settings())
    assert {"bits_per_weight", "mode", "seed", "curvature", "tune"} <= kept
    assert kept.isdisjoint({"progress", "cache_dir", "workers", "device", "resume", "keep_work"})


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_with_the_known_ones(kind: type[Record]) -> None:
    with pytest.raises(OptionError, match=r"unknown option 'xyzzy'.*remove it") as caught:
        parse(kind, {"xyzzy": "red"})
    assert caught.value.allowed == ", ".join(sorted(field.name for field in dataclasses.fields(kind)))


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_slip_of_the_pen_is_met_with_the_right_name(kind: type[Record], name: str) -> None:
    with pytest.raises(OptionError, match=f"did you mean '{name[:-1]}.'"):
        parse(kind, {name[:-1]: examples(kind, name)[0]})


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


def test_skip_names_routers_and_heads_have_an_option_of_their_own() -> None:
    assert CompressionConfig().skips("model.layers.0.mlp.gate") and CompressionConfig(
        skip=["*lm_head"]
    ).skips("lm_head")
    assert not CompressionConfig().skips("model.layers.0.mlp.up_proj")
    assert CompressionConfig().head == "int8"
    assert CompressionConfig(head="4.5").head == 4.5  # as a command line gives it


def test_a_head_is_a_kind_of_table_or_a_number_of_bits() -> None:
    for value in ("int3", 0.0, 17, "nan"):
        with pytest.raises(OptionError, match="head"):
            CompressionConfig(head=value)


@pytest.mark.parametrize("kind", KINDS)
def test_options_cannot_be_changed(kind: type[Record]) -> None:
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), name, 3)


@pytest.mark.parametrize("limit", [1, 7, 7.0, 0.1, 0.999, None])
def test_a_limit_is_a_number_of_examples_or_their_share(limit: Any) -> None:
    stored = EvaluationConfig(limit=limit).limit
    assert stored == limit and (stored is None or stored < 1 or isinstance(stored, int))


@pytest.mark.parametrize("limit", [0, -1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_limit_that_is_neither_is_refused(limit: float) -> None:
    with pytest.raises(OptionError, match=r"limit=.*a share between 0 and 1"):
        EvaluationConfig(limit=limit)


def test_the_nearest_name_may_be_another_spelling() -> None:
    with pytest.raises(OptionError, match="did you mean 'bits'"):
        parse(CompressOptions, {"bitz": 1.0})
