"""Names of options reach layers however the model is compiled and whatever is wrapped around it."""

import logging

import pytest
import torch
from support.compiled import TOLERANCE, Block
from support.models.tiny import OPTIONS, error_of, factored, randn
from torch import nn

import dbf_compile

MOMENTS = {
    f"{index}.linear": dbf_compile.Importance(torch.logspace(-3, 3, 70).roll(11 * index))
    for index in range(2)
}


class Outer(nn.Module):
    """A user's module around a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Broken(Outer):
    """The same with a break of the graph in front of the model."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.inner(x)


def whole(model, options):
    return torch.compile(model, backend="dbf", options=options)


def blocks(model, options):
    for block in model:
        block.compile(backend="dbf", options=options)
    return model


def blocks_replaced(model, options):
    for index, block in enumerate(model):
        model[index] = torch.compile(block, backend="dbf", options=options)
    return model


def wrapped(model, options):
    return whole(Outer(model), options)


def with_a_break(model, options):
    return whole(Broken(Outer(model)), options)


def blocks_of_a_wrapped_model(model, options):
    return Outer(blocks(model, options))


def a_function(model, options):
    return torch.compile(lambda x: model(x), backend="dbf", options=options)


WAYS = [whole, blocks, blocks_replaced, wrapped, with_a_break, blocks_of_a_wrapped_model, a_function]
MANY_WAYS = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def model():
    return nn.Sequential(Block(1), Block(2))


@pytest.fixture(scope="module")
def expected():
    return factored(model(), importance=MOMENTS)(randn(4, 70))


@MANY_WAYS
def test_measured_importance_reaches_its_layers(way, expected):
    run = way(model(), OPTIONS | {"importance": MOMENTS})
    assert error_of(run(randn(4, 70)), expected) < TOLERANCE


@MANY_WAYS
def test_ready_factors_reach_their_layers(way, expected, tmp_path, factorized_shapes):
    factors = dbf_compile.factorize_model(model(), importance=MOMENTS, **OPTIONS)
    dbf_compile.save(factors, tmp_path / "factors.safetensors")
    factorized_shapes.clear()
    run = way(model(), OPTIONS | {"checkpoint": str(tmp_path / "factors.safetensors")})
    assert error_of(run(randn(4, 70)), expected) < TOLERANCE
    assert factorized_shapes == []


@pytest.mark.parametrize(
    "options",
    [
        {"skip": ["*.lineer"]},
        {"overrides": {"0.linea": 3.0}},
        {"importance": {"0.liner": dbf_compile.Importance(torch.ones(70))}},
        {"skip": ["*lm_head", "linear", "block.*"]},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("way", [whole, blocks, wrapped, with_a_break], ids=lambda way: way.__name__)
def test_names_that_match_no_layer_are_an_error_with_the_nearest(way, options):
    with pytest.raises(
        Exception, match=r"OptionError: \w+: .* matches no layer of .*'(inner\.)*[01]\.linear'"
    ):
        way(model(), OPTIONS | options)(randn(4, 70))


def test_names_that_a_function_does_not_know_are_said(caplog):
    with caplog.at_level(logging.WARNING, logger="dbf_compile"):
        a_function(model(), OPTIONS | {"skip": ["*.lineer"]})(randn(4, 70))
    assert "skip: '*.lineer' matches no layer" in caplog.text


def test_a_part_that_is_called_alone_cannot_know_which_it_is(expected):
    part = torch.compile(model()[0], backend="dbf", options=OPTIONS | {"importance": MOMENTS})
    with pytest.raises(Exception, match=r"could belong to any of '0', '1'.*call the part through its model"):
        part(randn(4, 70))


@pytest.mark.parametrize("way", [blocks, whole, with_a_break], ids=lambda way: way.__name__)
def test_patterns_of_one_part_serve_that_part(way, caplog):
    with caplog.at_level(logging.INFO, logger="dbf_compile"):
        way(model(), OPTIONS | {"skip": ["*linear"]})(randn(4, 70))
    assert "skipped by name" in caplog.text
