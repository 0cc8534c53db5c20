"""Hashes: they change with the content and with nothing else."""

import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dbf_compile.hashes import batches_hash, model_hash, source_hash, tensor_hash

SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(SHAPES, st.integers(0, 99))
def test_a_tensor_hash_does_not_depend_on_strides(shape, seed):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    strided = torch.stack([tensor, -tensor], -1)[..., 0]
    assert tensor_hash(tensor) == tensor_hash(strided) == tensor_hash(tensor.clone().requires_grad_())
    assert len(tensor_hash(tensor)) == 32


def test_a_tensor_hash_depends_on_dtype_shape_and_every_bit():
    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(8, dtype=torch.bfloat16),
        torch.tensor([0.0, 0.0, 0.0, -0.0]),
        torch.tensor([0.0, 0.0, 0.0, 1e-45]),
    ]
    assert len({tensor_hash(tensor) for tensor in tensors}) == len(tensors)


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["whole", "transposed", "strided", "expanded", "one", "none"])
def test_a_hash_leaves_no_trace(dtype, view):
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    changed = {
        "whole": lambda x: x,
        "transposed": lambda x: x.T,
        "strided": lambda x: x[::2, 1::3],
        "expanded": lambda x: x[0].expand(5, 6),
        "one": lambda x: x[1, 2],
        "none": lambda x: x[:0],
    }[view](tensor)
    version, attributes, storage = tensor._version, set(vars(changed)), tensor.untyped_storage()
    assert tensor_hash(changed) == tensor_hash(changed.clone(memory_format=torch.contiguous_format))
    assert (tensor._version, set(vars(changed)), weakref.getweakrefs(changed)) == (version, attributes, [])
    assert storage.resizable()


@pytest.mark.parametrize(
    ("tensor", "plain"),
    [
        (torch.tensor([1 + 2j, 3j]).conj(), torch.tensor([1 - 2j, complex(0, -3)])),
        (torch.tensor([1 + 2j, 3j]).conj().imag, torch.tensor([-2.0, -3.0])),
        (nn.Parameter(torch.ones(3)), torch.ones(3)),
        (torch.ones(3).requires_grad_() * 1, torch.ones(3)),
    ],
    ids=["conjugate", "negative", "parameter", "result"],
)
def test_a_hash_is_of_values(tensor, plain):
    assert tensor_hash(tensor) == tensor_hash(plain)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: TwoTensor(x, x + 1),
    ],
    ids=["coo", "csr", "quantized", "subclass"],
)
def test_tensors_of_every_layout_have_hashes(kind):
    one, other = torch.eye(3), torch.eye(3) + torch.eye(3)
    assert tensor_hash(kind(one)) == tensor_hash(kind(one.clone())) != tensor_hash(kind(other))


@torch.inference_mode()
def test_tensors_of_inference_mode_have_hashes():
    assert tensor_hash(torch.ones(3)) == tensor_hash(torch.ones(3))


def test_a_batches_hash_sees_names_order_and_values_but_not_the_order_of_names():
    x, y = torch.ones(2), torch.zeros(2)
    kinds = [[x], [x, y], [y, x], [{"x": x}], [{"y": x}], [{"x": y}], [(x, 3)], [(x, 4)], []]
    assert len({batches_hash(batches) for batches in kinds}) == len(kinds)
    assert batches_hash([{"a": x, "b": y}]) == batches_hash([{"b": y, "a": x}])
    assert batches_hash(iter([[x, y]])) == batches_hash([(x, y)])


def test_a_model_hash_sees_names_tensors_and_the_configuration():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    plain, renamed, changed, configured = (model() for _ in range(4))
    renamed.add_module("last", nn.Linear(1, 1))
    changed[1].running_mean[0] = 1e-30
    configured.config = {"layers": 1}
    hashes = {model_hash(one) for one in (plain, renamed, changed, configured)}
    assert len(hashes) == 4 and model_hash(model()) == model_hash(plain)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files, with a linked subpackage and a file that is no source."""
    root, linked = tmp_path / "hashed_package", tmp_path / "elsewhere"
    root.mkdir()
    linked.mkdir()
    (root / "__init__.py").write_text("raise ImportError('must not be imported')")
    (root / "notes.md").write_text("notes")
    (linked / "__init__.py").write_text("")
    (linked / "kernel.cpp").write_text("int x;")
    (root / "linked").symlink_to(linked)
    monkeypatch.syspath_prepend(tmp_path)
    source_hash.cache_clear()
    yield root
    source_hash.cache_clear()


def test_a_source_hash_sees_all_sources_and_imports_nothing(package):
    def fresh():
        source_hash.cache_clear()
        return source_hash("hashed_package")

    first = fresh()
    assert first == fresh() and "hashed_package" not in sys.modules
    (package / "notes.md").write_text("other notes")
    assert fresh() == first
    (package / "linked" / "kernel.cpp").write_text("int y;")
    second = fresh()
    (package / "new.py").write_text("")
    third = fresh()
    assert len({first, second, third}) == 3
    (package / "new.py").rename(package / "newer.py")
    assert fresh() != third


def test_packages_are_hashed_together():
    one, other = "dbf_compile.factorizer", "dbf_compile.calibration"
    assert len({source_hash(one), source_hash(other), source_hash(one, other)}) == 3
