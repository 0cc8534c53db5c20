"""Onload and offload: blocks that visit a device compute the same, keep less, and come home."""

import copy

import pytest
import torch
from support.models.calibrated import same, state_of, tiny, tokens
from support.models.tiny import tiny_llama
from torch import nn

from dbf_compile.calibration.calibrate import calibrate
from dbf_compile.calibration.moments import Moment
from dbf_compile.calibration.offload import Recomputation, blocks_of, offloaded, without_kv_cache
from dbf_compile.linear import dense_linears

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_blocks_that_visit_a_device_one_at_a_time_give_the_same(kind):
    model = tiny(kind)
    plain = calibrate(model, tokens(), curvature="input")
    before = state_of(model, [])
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    onloaded = calibrate(model, tokens(), curvature="input", device="cpu")
    assert same(before, state_of(model, []))
    assert storages == [parameter.data_ptr() for parameter in model.parameters()]
    assert set(plain) == set(onloaded)
    for name, item in plain.items():
        assert torch.equal(item.input_second_moment, onloaded[name].input_second_moment)
        if item.output_grad_second_moment is not None:
            # What is computed again is computed by the same operations.
            torch.testing.assert_close(
                item.output_grad_second_moment, onloaded[name].output_grad_second_moment
            )


def test_what_is_computed_again_is_not_measured_again(monkeypatch):
    def additions(device):
        calls = []
        add = Moment.add
        with monkeypatch.context() as patch:
            patch.setattr(Moment, "add", lambda *args, **kwargs: calls.append(1) or add(*args, **kwargs))
            calibrate(tiny("causal"), tokens(2), device=device)
        return len(calls)

    assert additions("cpu") == additions(None) > 0


def test_blocks_keep_only_their_inputs_for_the_backward_pass():
    def kept(device):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        model = tiny("causal")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            calibrate(model, tokens(1), device=device)
        return sum(sizes)

    assert kept("cpu") < 0.5 * kept(None)


def test_a_failure_half_way_brings_every_block_home():
    model = tiny("causal")
    before = state_of(model, [])

    def loss(output, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibrate(model, tokens(1), loss=loss, device="cpu")
    assert same(before, state_of(model, []))
    assert all("forward" not in vars(module) for module in model.modules())


def test_hooks_are_told_that_a_block_is_computed_again():
    block, recomputation = nn.Linear(3, 3), Recomputation()
    passes = []
    block.register_forward_pre_hook(lambda *_: passes.append(recomputation.running))
    inner = nn.Sequential(block)
    model = nn.Sequential(inner)
    with offloaded(model, [inner], "cpu", recomputation):
        model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert passes == [False, True] and not recomputation.running


def test_a_setting_of_the_cache_comes_back():
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError), without_kv_cache(model):
        assert not model.config.use_cache
        raise ZeroDivisionError
    assert model.config.use_cache


def test_blocks_are_the_members_of_every_outermost_list_that_holds_a_layer():
    model = nn.Module()
    model.short = nn.ModuleList([nn.Linear(2, 2)])
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)] * 5)}) for _ in range(2)
    )
    model.shorter = nn.ModuleList([nn.Linear(2, 2)])
    model.unused = nn.ModuleList([nn.ReLU()] * 9)
    assert list(blocks_of(model, dense_linears(model))) == ["short.0", "blocks.0", "blocks.1", "shorter.0"]
    assert list(blocks_of(model, ["short.0"])) == ["short.0"]
    assert blocks_of(nn.Linear(2, 2), [""]) == {}


def test_a_container_among_the_blocks_stays_on_the_device_and_a_shared_block_is_onloaded_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 2)})])
            self.blocks = nn.ModuleList([nn.Linear(2, 2)] * 3)

        def forward(self, x):
            x = self.parts[0]["up"](x)
            for block in self.blocks:
                x = block(x)
            return x

    model, calls = Model(), []
    expected = model(torch.ones(1, 2))
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with offloaded(model, [*model.parts, *model.blocks], "cpu"), torch.no_grad():
        assert torch.equal(model(torch.ones(1, 2)), expected)
    assert len(calls) == 3 and all("forward" not in vars(module) for module in model.modules())


def test_the_caches_of_all_parts_of_a_model_are_off():
    model = tiny_llama()
    inner = model.model
    inner.config = copy.deepcopy(model.config)
    with without_kv_cache(model):
        assert not model.config.use_cache and not inner.config.use_cache
    assert model.config.use_cache and inner.config.use_cache
