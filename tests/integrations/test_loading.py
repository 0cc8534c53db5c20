"""Offloaded models: whatever lies on disk or is moved by accelerate, outputs and saved tensors are the same bits."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.models.architectures import random_model
from support.strategies import random_factors_like

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import remove_hook_from_submodules  # noqa: E402

from dbf_compile.factors import DoubleBinaryFactors  # noqa: E402
from dbf_compile.integrations.loading import finish_layers_, is_here  # noqa: E402
from dbf_compile.linear import dense_linears, dense_weight, swap_  # noqa: E402

TOKENS = torch.arange(1, 17)[None]
# The layer that has the first stage, two that share it, and the parent of the blocks: without biases, and with.
NAMES = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "model.layers"),
    "bert": ("attention.self.query", "attention.self.key", "attention.self.value", "bert.encoder.layer"),
}


def shared(kind):
    model = random_model(kind).requires_grad_(False)
    owner, *sharers, _ = NAMES[kind]
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in dense_linears(model).items() if layer is not head}
    factors = {name: random_factors_like(dense_weight(one), 40, len(name)) for name, one in layers.items()}
    for name, one in factors.items():
        for end in sharers:
            if name.endswith(end):
                first = factors[name.removesuffix(end) + owner]
                factors[name] = DoubleBinaryFactors(
                    first.signs_in, one.signs_out, first.scale_in, first.scale_mid, one.scale_out
                )
    return swap_(model, factors)


@pytest.fixture(scope="module", params=list(NAMES))
def saved(request, tmp_path_factory):
    """The kind of a model, the model, its folder, and its output."""
    model, folder = shared(request.param), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return request.param, model, folder, model(TOKENS).logits


def device_map(kind, model, disk):
    """Return a map with all modules on the CPU but those of the first block whose names end as one of ``disk``."""
    block = f"{NAMES[kind][3]}.0."
    places = {}
    for name, module in model.named_modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            on_disk = name.startswith(block) and any(name.endswith(end) for end in disk)
            places[name] = "disk" if on_disk else "cpu"
    return places


def maps(kind, model):
    owner, sharer, *_ = NAMES[kind]
    return [device_map(kind, model, disk) for disk in ([""], [owner], [sharer])]


def assert_same_twice(model, expected):
    for _ in range(2):  # hooks have put tensors back after the first call
        assert torch.equal(model(TOKENS).logits, expected)


def assert_saved_the_same(model, folder, place):
    model.save_pretrained(place)
    first, second = (load_file(path / "model.safetensors") for path in (folder, place))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("loaded", [False, True])
def test_offloading_a_whole_model(saved, tmp_path, loaded):
    kind, model, folder, expected = saved
    model = type(model).from_pretrained(folder) if loaded else copy.deepcopy(model)
    for offload in (
        lambda: accelerate.cpu_offload(model, "cpu"),
        lambda: accelerate.disk_offload(model, tmp_path / "offload", "cpu"),
    ):
        assert_same_twice(offload(), expected)
        remove_hook_from_submodules(model)
        assert_same_twice(model, expected)
    if kind == "llama":  # accelerate has untied the head of BERT, dense or not
        assert_saved_the_same(model, folder, tmp_path / "again")


@pytest.mark.parametrize("index", range(3), ids=["block", "owner", "sharer"])
def test_dispatching_a_converted_model(saved, tmp_path, index):
    kind, model, folder, expected = saved
    places = maps(kind, model)[index]
    for step in ("saved before it is called", "called"):
        moved = accelerate.dispatch_model(copy.deepcopy(model), places, offload_dir=tmp_path / step / "disk")
        if step == "called":
            assert_same_twice(moved, expected)
            moved.save_pretrained(tmp_path / step)
            again = type(model).from_pretrained(tmp_path / step)
            assert_same_twice(again, expected)
        else:
            assert_saved_the_same(moved, folder, tmp_path / step)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("index", range(5), ids=["block", "owner", "sharer", "cpu", "disk"])
def test_loading_with_a_map(saved, tmp_path, index, buffers):
    kind, model, folder, expected = saved
    places = [*maps(kind, model), {"": "cpu"}, {"": "disk"}][index]
    before = dict(places)
    moved = type(model).from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=buffers
    )
    assert places == before
    assert_same_twice(moved, expected)
    assert (sum(parameter.is_meta for parameter in moved.parameters()) > 0) == (index in (0, 1, 4))
    if kind == "llama" or index != 4:  # as above
        assert_saved_the_same(moved, folder, tmp_path / "again")
    remove_hook_from_submodules(moved)


def test_too_little_memory_sends_layers_to_the_disk(saved, tmp_path):
    _, model, folder, expected = saved
    moved = type(model).from_pretrained(
        folder, device_map="auto", max_memory={"cpu": 150_000}, offload_folder=tmp_path / "offload"
    )
    assert_same_twice(moved, expected)
    assert_saved_the_same(moved, folder, tmp_path / "again")


def test_a_finished_layer_trains_no_factors(saved):
    _, model, folder, _ = saved
    loaded = type(model).from_pretrained(folder)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.endswith(("signs_in", "scale_in", "scale_out")) for name in trained)
    assert finish_layers_(loaded, {}) is None


def test_what_is_sharded_is_not_here_whole():
    class Shard(torch.Tensor):
        pass

    words = torch.ones(3, 2, dtype=torch.int32)
    assert is_here(torch.nn.Parameter(words, requires_grad=False))
    for elsewhere in (words.to("meta"), words.as_subclass(Shard)):
        assert not is_here(torch.nn.Parameter(elsewhere, requires_grad=False))
