"""Huge pages: the same numbers elsewhere, tied tensors stay tied, and what cannot be moved stays where it is."""

import mmap

import pytest
import torch
from support.models.tiny import tiny_llama
from torch import nn

from dbf_compile import huge_pages
from dbf_compile.huge_pages import in_huge_pages, move_to_huge_pages

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(huge_pages, "_PAGE", 2**12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_content_is_the_same_and_lies_elsewhere(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (65, 33), "vector": (7,), "number": (), "large": (5, 1000)}
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    moved = in_huge_pages(tensors)
    assert list(moved) == list(tensors)
    for name, tensor in tensors.items():
        assert moved[name].data_ptr() != tensor.data_ptr() and moved[name].data_ptr() % 64 == 0
        assert moved[name].untyped_storage().nbytes() == tensor.nbytes
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=0)
    if dtype.is_floating_point:
        moved["matrix"].fill_(float("nan"))
        assert not moved["large"].isnan().any() and not moved["vector"].isnan().any()


def test_what_cannot_be_moved_stays():
    whole = torch.arange(4000.0)
    tensors = {
        "transposed": torch.ones(30, 40).T,
        "empty": torch.ones(0, 3),
        "meta": torch.ones(9, device="meta"),
        "first": whole[:3000],
        "second": whole[1000:],
        "inside": whole[1500:1600],
        "other": torch.ones(3000),
    }
    moved = in_huge_pages(tensors)
    for name, tensor in tensors.items():
        assert (moved[name] is tensor) == (name != "other")
    assert torch.equal(moved["other"], tensors["other"])


@pytest.mark.parametrize("view", [lambda whole: whole.T, lambda whole: whole[:, ::2]])
def test_what_shares_memory_with_one_that_stays_stays(view):
    whole = torch.ones(60, 70)
    tensors = {"whole": whole, "view": view(whole), "other": torch.ones(3000)}
    moved = in_huge_pages(tensors)
    assert moved["whole"] is whole and moved["view"] is tensors["view"]
    assert moved["other"] is not tensors["other"]


def test_where_there_is_no_memory_left_nothing_changes(monkeypatch):
    def full(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    tensors = {"one": torch.ones(5000)}
    assert in_huge_pages(tensors)["one"] is tensors["one"]


def test_memory_begins_with_a_page_and_asks_for_huge_ones(monkeypatch):
    asked = []

    class Noted(mmap.mmap):
        def madvise(self, *arguments):
            asked.append(arguments)

    monkeypatch.setattr(mmap, "mmap", Noted)
    moved = in_huge_pages({"one": torch.ones(5000), "two": torch.ones(3000)})
    assert min(tensor.data_ptr() for tensor in moved.values()) % 2**12 == 0
    assert asked == [(mmap.MADV_HUGEPAGE,)]


def test_neighbours_in_one_storage_are_moved_one_by_one():
    whole = torch.arange(4000.0)
    moved = in_huge_pages({"first": whole[:1000], "second": whole[1000:]})
    assert torch.equal(torch.cat([moved["first"], moved["second"]]), whole)
    assert all(tensor.storage_offset() == 0 for tensor in moved.values())


def test_tied_tensors_stay_tied():
    tensor = torch.ones(3000)
    moved = in_huge_pages({"one": tensor, "same": tensor, "shaped": tensor.view(30, 100)})
    moved["one"].fill_(2.0)
    assert torch.equal(moved["same"], torch.full((3000,), 2.0)) and moved["shaped"].min() == 2.0


@pytest.mark.parametrize("few", [True, False])
def test_nothing_changes_where_nothing_is_gained(monkeypatch, few):
    if not few:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    tensors = {"one": torch.ones(10 if few else 5000)}
    assert in_huge_pages(tensors)["one"] is tensors["one"]


def test_a_model_computes_as_before_and_its_head_is_still_its_embedding(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    ids = torch.arange(12)[None]
    before, parameters = model(ids).logits, dict(model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    move_to_huge_pages(model)
    assert torch.equal(model(ids).logits, before)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.data_ptr() != addresses[name]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, before)


def test_a_model_is_moved_tensor_by_tensor(monkeypatch):
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(3)))
    addresses = [layer.weight.data_ptr() for layer in model]
    seen = []
    whole = huge_pages._copies

    def watched(tensors):
        for pair in whole(tensors):
            seen.append(sum(layer.weight.data_ptr() in addresses for layer in model))
            yield pair

    monkeypatch.setattr(huge_pages, "_copies", watched)
    move_to_huge_pages(model)
    assert seen == [3, 2, 1]  # so at most one tensor is in memory twice


def test_a_subclass_of_tensors_stays():
    class Own(torch.Tensor):
        pass

    own = nn.Parameter(torch.ones(3000)).data.as_subclass(Own)
    assert in_huge_pages({"own": own, "plain": torch.ones(3000)})["own"] is own
