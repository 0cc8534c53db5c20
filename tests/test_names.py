"""Names in options: they match layers wherever the model stands, and an error shows the nearest where they match none."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dbf_compile.errors import OptionError
from dbf_compile.names import Scope, check_names, is_adapter, layer_names, plain_name, scope_of, unmatched

MODEL = [f"layers.{index}.{name}" for index in range(3) for name in ("q", "up", "mlp.down")] + ["head"]
COMPONENTS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.a.b",
        "a._orig_mod.b",
        "a.b.base_layer",
        "a._fsdp_wrapped_module.b",
        "_checkpoint_wrapped_module.a.b",
        "a.b",
    ],
)
def test_wrappers_are_no_part_of_a_name(name):
    assert plain_name(name) == "a.b"


def test_layers_are_what_holds_tensors():
    inner = nn.Sequential(OrderedDict(up=nn.Linear(2, 2), norm=nn.BatchNorm1d(2), act=nn.ReLU()))
    assert layer_names(nn.Sequential(OrderedDict(inner=inner, tied=inner.up))) == [
        "inner.up",
        "inner.norm",
        "tied",
    ]


@given(st.lists(COMPONENTS, min_size=1, max_size=8, unique=True), st.data())
def test_a_scope_finds_the_layers_of_a_model_that_is_wrapped_or_cut(layers, data):
    wrapped = [f"x.y.{layer}" for layer in layers] + ["z"]
    assert scope_of({"importance": layers}, wrapped).name(f"x.y.{layers[0]}") == layers[0]
    assert scope_of({"importance": [*wrapped]}, layers).added in ("x.y", "")
    assert scope_of({"importance": wrapped}, wrapped) == Scope()
    assert scope_of({}, layers) == Scope()


@pytest.mark.parametrize(
    ("options", "layers", "inner", "scope"),
    [
        ({"skip": ["*.up"]}, MODEL, "", Scope()),
        ({"skip": ["layers.0.*"]}, [f"module.{layer}" for layer in MODEL], "", Scope("module")),
        (
            {"skip": ["layers.0.*"]},
            [f"base_model.model.{layer}" for layer in MODEL],
            "",
            Scope("base_model.model"),
        ),
        ({"overrides": {"up": 3.0}}, MODEL, "layers.1", Scope("layers.1")),
        ({"overrides": {"*up": 3.0}}, MODEL, "layers.1", Scope()),
        ({"skip": ["nothing"]}, MODEL, "layers.1", Scope()),
        ({"importance": ["up", "q"]}, MODEL, "layers.1", Scope("layers.1")),
        ({"checkpoint": MODEL}, ["q", "up", "mlp.down"], "", None),
        ({"checkpoint": MODEL[:3]}, ["q", "up", "mlp.down"], "", Scope(added="layers.0")),
        ({"checkpoint": MODEL}, [layer.partition(".")[2] for layer in MODEL[:-1]], "", Scope(added="layers")),
        ({"importance": ["up"]}, MODEL, "", None),
    ],
)
def test_where_names_start(options, layers, inner, scope):
    if scope is None:
        with pytest.raises(OptionError, match=r"could belong to any of 'layers\.0', 'layers\.1'"):
            scope_of(options, layers, inner)
    else:
        assert scope_of(options, layers, inner) == scope


def test_names_that_match_nothing_are_an_error_with_the_nearest():
    check_names("skip", ["*.up", "head", "layers.*"], MODEL, "Model")
    assert unmatched(["*.up", "upp"], MODEL) == ["upp"]
    with pytest.raises(
        OptionError, match=r"overrides: '\*\.dwon' matches no layer of Model; .*'layers.0.mlp.down'"
    ):
        check_names("overrides", ["*.dwon", "*.up"], MODEL, "Model")


def test_adapters_stand_beside_what_they_adapt():
    names = ["h.q.base_layer", "h.q.lora_A.default", "h.k", "base_layer"]
    assert [is_adapter(name, names) for name in names] == [False, True, False, False]
