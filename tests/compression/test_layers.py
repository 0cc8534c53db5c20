"""Which layers are factored, together with which, and the one style of calling that all functions share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dbf_compile
from dbf_compile import AllocationConfig, CompressionConfig, DoubleBinaryLinear
from dbf_compile.compression.layers import LayerFactorizer, stacks_of
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.factors import mid_features_for

FAST: dict[str, Any] = {"bits_per_weight": 3.0, "preset": "fast", "iterations": 10, "progress": False}


class Block(nn.Module):
    """Layers under the names of siblings, two of other sizes, and one that an embedding reads."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(48, 32)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.embedding, self.tied, self.tiny = nn.Embedding(80, 64), nn.Linear(64, 80), nn.Linear(8, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        self.tied.weight = self.embedding.weight


@pytest.fixture
def block() -> Block:
    return Block().eval().requires_grad_(False)


def names(block: nn.Module, **options: Any) -> list[list[str]]:
    return [list(stack) for stack, _ in stacks_of(block, LayerFactorizer(CompressionConfig(**options)))]


def test_siblings_of_one_input_are_stacked_and_tied_or_tiny_layers_stay_dense(block: Block) -> None:
    assert names(block, **FAST) == [["q_proj", "k_proj"], ["v_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    alone = names(block, **FAST, merge_shared_inputs=False)
    assert alone == [[name] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")]


def test_siblings_of_other_bits_are_apart(block: Block) -> None:
    assert names(block, **FAST, overrides={"k_proj": 4.0})[:2] == [["q_proj"], ["k_proj"]]
    assert ["up_proj"] not in names(block, **FAST, skip=["up_proj"])


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_config_its_fields_as_keywords_and_both_are_one(block: Block) -> None:
    config = CompressionConfig(**FAST)
    ways = [
        dbf_compile.convert_(copy.deepcopy(block), **FAST),
        dbf_compile.convert_(copy.deepcopy(block), config=config),
        dbf_compile.convert_(copy.deepcopy(block), config=CompressionConfig(**FAST | {"seed": 3}), seed=0),
        dbf_compile.convert_(
            copy.deepcopy(block), bits=3.0, **{k: v for k, v in FAST.items() if "bits" not in k}
        ),
        dbf_compile.convert_(copy.deepcopy(block), dbf_compile.factorize_model(block, config)),
        dbf_compile.convert_(copy.deepcopy(block), dbf_compile.factorize_model(block, **FAST)),
    ]
    assert all(same(ways[0], way) for way in ways[1:])
    assert isinstance(ways[0].q_proj, DoubleBinaryLinear)


def test_an_allocation_is_taken_as_it_is(block: Block) -> None:
    allocation = dbf_compile.allocate(block, config=AllocationConfig(**FAST, multiple=8))
    converted = dbf_compile.convert_(copy.deepcopy(block), allocation=allocation, **FAST)
    by_name = dbf_compile.convert_(copy.deepcopy(block), allocation=allocation.mid_features, **FAST)
    assert same(converted, by_name)
    assert converted.down_proj.mid_features == allocation.mid_features["down_proj"]
    with pytest.raises(ConversionError, match="allocation without 'q_proj'"):
        dbf_compile.convert_(block, allocation=allocation, merge_shared_inputs=False, **FAST)


def test_overrides_win_over_an_allocation(block: Block) -> None:
    options = FAST | {"overrides": {"down_proj": 5.0}}
    allocation = dbf_compile.allocate(block, config=AllocationConfig(**FAST, multiple=8))
    converted = dbf_compile.convert_(copy.deepcopy(block), allocation=allocation, **options)
    assert converted.down_proj.mid_features == mid_features_for(5.0, 96, 64)
    assert converted.gate_proj.mid_features == allocation.mid_features["gate_proj + up_proj"]
    with_it = dbf_compile.allocate(block, config=AllocationConfig(**options, multiple=8))
    both = dbf_compile.convert_(copy.deepcopy(block), allocation=with_it, **options)
    assert both.down_proj.mid_features == with_it.mid_features["down_proj"] == mid_features_for(5.0, 96, 64)
    with pytest.raises(ConversionError, match=r"allocation without 'k_proj'.*same skip, overrides and"):
        dbf_compile.convert_(block, allocation=allocation, **FAST, overrides={"q_proj": 5.0})


def test_unknown_keywords_and_nothing_to_convert_are_refused(block: Block) -> None:
    for function in (
        dbf_compile.convert_,
        dbf_compile.factorize_model,
        dbf_compile.allocate,
        dbf_compile.calibrate,
    ):
        with pytest.raises(OptionError, match="unknown option 'presett'"):
            function(block, presett="fast")  # type: ignore[operator]
    for call in (dbf_compile.convert_, dbf_compile.allocate):
        with pytest.raises(ConversionError, match="without a linear layer to factor"):
            call(nn.Sequential(nn.Linear(4, 4)), **FAST)  # type: ignore[operator]


class Reads(Block):
    """A block that reads the weight of one of its layers without a call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(x) @ self.up_proj.weight


def test_layers_that_stay_dense_say_why_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Reads().eval().requires_grad_(False)
    model.gate_proj.to("meta")
    converted = dbf_compile.convert_(copy.deepcopy(model), skip=["v_proj"], **FAST)
    assert not isinstance(converted.up_proj, DoubleBinaryLinear)
    (message,) = caplog.messages
    title, _, reasons = message.partition("; left dense: ")
    assert title == "3 of 8 linear layers of Reads are factored"
    assert sorted(reasons.split("; ")) == [
        "1 on the meta device (gate_proj)",
        "1 skipped by name (v_proj)",
        "1 the model's head (tied)",
        "1 too small to gain at 3 bits per weight (tiny)",
        "1 whose weight is used without a call in Reads.forward (up_proj)",
    ]
    caplog.clear()
    with pytest.raises(ConversionError, match="without a linear layer to factor: 7 on the meta device"):
        dbf_compile.factorize_model(Block().to("meta"), **FAST)
    with pytest.raises(ConversionError, match="factors for 'up_proj', a layer whose weight is used"):
        factors = dbf_compile.factorize_model(Block().requires_grad_(False), **FAST)
        dbf_compile.convert_(model, factors)


def test_nothing_is_said_where_all_went_as_asked(block: Block, caplog: pytest.LogCaptureFixture) -> None:
    dbf_compile.convert_(block, **FAST)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["up"]}, r"skip: 'up' matches no layer of Block; allowed: .*'up_proj'"),
        ({"overrides": {"*.dwon": 2.0}}, r"overrides: '\*.dwon' matches no layer"),
        ({"importance": {"q_prj": dbf_compile.Importance()}}, r"importance: 'q_prj' matches .*'q_proj'"),
        ({"allocation": {"q_proj + k_prj": 9}}, r"allocation: 'k_prj' matches .*'k_proj'"),
    ],
)
def test_names_that_match_nothing_are_refused_with_the_nearest(
    block: Block, options: dict[str, Any], message: str
) -> None:
    for function in (dbf_compile.convert_, dbf_compile.factorize_model):
        with pytest.raises(OptionError, match=message):
            function(block, **FAST, **options)  # type: ignore[operator]
    assert dbf_compile.convert_(block, **FAST, skip=["*lm_head", "tied"]) is block


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPPERS = {
    "module": Wrapper,
    "DataParallel": nn.DataParallel,
    "compile": lambda block: torch.compile(block, backend="eager"),
    "PEFT's names": lambda block: nn.ModuleDict({"base_model": nn.ModuleDict({"model": block})}),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_reach_layers_through_wrappers(block: Block, wrap: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    moments = {name: torch.rand(64, generator=generator) for name in ("q_proj", "k_proj", "up_proj")}
    importance = {name: dbf_compile.Importance(moment) for name, moment in moments.items()}
    options: dict[str, Any] = FAST | {"skip": ["v_proj"], "overrides": {"down_proj": 4.0}}
    plain = dbf_compile.convert_(copy.deepcopy(block), importance=importance, **options)
    inside = copy.deepcopy(block)
    dbf_compile.convert_(wrap(inside), importance=importance, **options)
    assert same(plain, inside)
    factors = dbf_compile.factorize_model(wrap(copy.deepcopy(block)), importance=importance, **options)
    assert same(plain, dbf_compile.convert_(copy.deepcopy(block), factors))
    inside = copy.deepcopy(block)
    dbf_compile.convert_(wrap(inside), dbf_compile.factorize_model(block, importance=importance, **options))
    assert same(plain, inside)


def test_hooks_go_on_working(block: Block) -> None:
    block.q_proj.register_forward_hook(lambda module, args, y: -y)
    block.q_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = torch.ones(3, 64)
    expected = block.q_proj(x)
    dbf_compile.convert_(block, **FAST | {"bits_per_weight": 12.0})
    assert isinstance(block.q_proj, DoubleBinaryLinear)
    assert float((block.q_proj(x) - expected).norm() / expected.norm()) < 0.2


def test_ready_factors_heed_what_is_skipped() -> None:
    factors = dbf_compile.factorize_model(Block(), **FAST)
    model = dbf_compile.convert_(Block(), factors, skip=["q_proj"])
    assert type(model.q_proj) is nn.Linear and isinstance(model.k_proj, DoubleBinaryLinear)
    with pytest.raises(OptionError, match="matches no layer of Block"):
        dbf_compile.convert_(Block(), factors, skip=["p_proj"])


def test_what_is_no_module_and_what_is_not_initialized_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"a model of type function; allowed: a torch\.nn\.Module"):
        dbf_compile.convert_(lambda x: x, **FAST)
    with pytest.raises(ConversionError, match="of the class LazyLinear"):
        dbf_compile.convert_(nn.Sequential(nn.LazyLinear(64)), **FAST)
