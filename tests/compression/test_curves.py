"""Error curves of a model: what is measured, what the weights of curves mean, and the allocation that follows."""

import math

import pytest
import torch
from torch import nn

from dbf_compile.compression.curves import allocate, measure_curves
from dbf_compile.compression.layers import factorize_model
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.factorizer.importance import Importance
from dbf_compile.factors import mid_features_for
from dbf_compile.options import CompressionConfig


class Net(nn.Module):
    """Two blocks of linear layers; the second layer's output is worth more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"q_proj": nn.Linear(64, 64), "k_proj": nn.Linear(64, 32), "out": nn.Linear(64, 96)}
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(64, 10)


@pytest.fixture
def options(tmp_path):
    return {"bits_per_weight": 2.0, "cache_dir": str(tmp_path), "progress": False, "iterations": 20}


def importance(scale):
    return Importance(torch.ones(64), torch.full((96,), scale))


def test_a_model_is_measured_allocated_and_factored(options):
    model = Net()
    importances = {"blocks.0.out": importance(1.0), "blocks.1.out": importance(100.0)}
    allocation = allocate(model, importances, **options)
    assert set(allocation.mid_features) == {
        "blocks.0.q_proj + blocks.0.k_proj",
        "blocks.0.out",
        "blocks.1.q_proj + blocks.1.k_proj",
        "blocks.1.out",
    }
    assert allocation.mid_features["blocks.1.out"] > allocation.mid_features["blocks.0.out"]
    factors = factorize_model(model, CompressionConfig(**options), importances, allocation.mid_features)
    assert {name: item.mid_features for name, item in factors.items() if name.endswith("out")} == {
        name: size for name, size in allocation.mid_features.items() if name.endswith("out")
    }
    shared = {item.signs_in.data_ptr(): item for item in factors.values()}
    stored = sum(
        item.signs_in.numel() * 32 + 16 * (item.in_features + item.mid_features) for item in shared.values()
    )
    stored += sum(item.signs_out.numel() * 32 + 16 * item.out_features for item in factors.values())
    assert stored == allocation.stored


def test_overrides_of_the_options_are_fixed(options):
    allocation = allocate(Net(), None, overrides={"*.1.out": 3.0}, **options)
    assert allocation.reasons["blocks.1.out"] == "override"
    assert allocation.mid_features["blocks.1.out"] == mid_features_for(3.0, 64, 96)


def test_the_prior_on_depth_raises_the_last_block(options):
    config = CompressionConfig(**options)
    plain, raised = (measure_curves(Net(), config, None, depth_prior=prior) for prior in (0.0, 0.6))
    for name in plain:
        ratio = raised[name].weight / plain[name].weight
        assert ratio == pytest.approx(math.exp(-0.3 if "blocks.0" in name else 0.3))


def test_the_weight_of_a_curve_is_the_loss_of_dropping_the_layer(options):
    model = Net()
    moments = Importance(torch.rand(64) + 0.1, torch.rand(96) + 0.1)
    curves = measure_curves(model, CompressionConfig(**options), {"blocks.0.out": moments})
    weight = model.blocks[0]["out"].weight.detach()
    lost = (moments.output_grad_second_moment[:, None] * weight.square() * moments.input_second_moment).sum()
    assert curves["blocks.0.out"].weight == pytest.approx(float(lost), rel=1e-4)  # float32 sums


def test_a_model_with_nothing_to_compress_is_refused(options):
    with pytest.raises(ConversionError, match="without a linear layer"):
        allocate(nn.Sequential(nn.ReLU()), None, **options)


def test_an_allocation_of_another_model_is_refused(options):
    with pytest.raises(OptionError, match=r"allocation: .other. matches no layer of Net"):
        factorize_model(Net(), CompressionConfig(**options), None, {"other": 32})
