"""Both stages split over ranks: every rank is a thread here, and they exchange what vLLM would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
import vllm.model_executor.layers.linear as vllm_linear
from support.strategies import random_factors
from support.vllm_layers import as_rank, config_of, dense, load
from vllm.config import VllmConfig, set_current_vllm_config

from dbf_compile.errors import OptionError
from dbf_compile.integrations.vllm import split
from dbf_compile.integrations.vllm.sharding import middle_range

K, HEAD = 96, 24
SPLIT = VllmConfig(additional_config={"dbf": {"split_stages": True}})


class Ranks:
    """Threads that exchange tensors as ranks do."""

    def __init__(self, count: int) -> None:
        self._count, self._barrier, self._own = count, Barrier(count), local()
        self._tensors: list[Tensor] = [torch.empty(0)] * count

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        def of_rank(rank: int) -> Tensor:
            self._own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(of_rank, range(self._count)))

    def gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchanged(tensor), dim)

    def reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchanged(tensor)).sum(0)

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        self._tensors[self._own.rank] = tensor
        self._barrier.wait()
        result = list(self._tensors)
        self._barrier.wait()
        return result


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with set_current_vllm_config(SPLIT):
        yield


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Ranks]:
    threads = Ranks(request.param)
    monkeypatch.setattr(split, "tensor_model_parallel_all_gather", threads.gather)
    for module in (split, vllm_linear):
        monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", threads.reduce)
    return request.param, threads


# Of R = 40 the last of four ranks has nothing; of 137 each has a part.
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("middle", [40, 137])
def test_column_parallel(
    middle: int, mixed: bool, ranks: tuple[int, Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    count, threads = ranks
    sizes = [4 * HEAD, 2 * HEAD, 2 * HEAD]
    q, v = random_factors(K, middle, sizes[0] + sizes[2]).split([sizes[0], sizes[2]])
    weights = {"q": q, "k": torch.randn(sizes[1], K) if mixed else random_factors(K, 33, sizes[1], 1), "v": v}
    layers = []
    for rank in range(count):
        as_rank(monkeypatch, rank, count)
        config = config_of(weights, {"qkv_proj": "qkv"})
        layer = vllm_linear.QKVParallelLinear(
            K, HEAD, 4, 2, bias=False, quant_config=config, prefix="block.qkv_proj"
        )
        layers.append(load(layer, weights, "qkv"))
        assert len(layer.signs_in_0) == middle_range(middle, rank, count)[1]
    x = torch.randn(5, K)
    results = threads.run(lambda rank: layers[rank](x)[0])
    heads = [x.double() @ weight.T for weight in dense(weights)]
    for rank, y in enumerate(results):
        parts = (count, min(count, 2), min(count, 2))
        own = torch.cat(
            [head.chunk(n, 1)[rank * n // count] for head, n in zip(heads, parts, strict=True)], 1
        )
        assert (y.double() - own).abs().max() < 1e-5 * own.abs().max()


@pytest.mark.parametrize("middle", [40, 137])
def test_row_parallel(middle: int, ranks: tuple[int, Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    count, threads = ranks
    weights = {"o": random_factors(K, middle, 70)}
    layers = []
    for rank in range(count):
        as_rank(monkeypatch, rank, count)
        layer = vllm_linear.RowParallelLinear(
            K, 70, bias=True, quant_config=config_of(weights, {}), prefix="block.o"
        )
        layer.bias.data = torch.ones(70)
        layers.append(load(layer, weights, [None]))
        assert 32 * layer.signs_out_0.shape[1] == middle_range(middle, rank, count)[1]
    x = torch.randn(2, 5, K)
    expected = x.double() @ dense(weights)[0].T + 1
    for y in threads.run(lambda rank: layers[rank](x.chunk(count, -1)[rank])[0]):
        assert (y.double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_unknown_settings_are_refused() -> None:
    with (
        set_current_vllm_config(VllmConfig(additional_config={"dbf": {"split": True}})),
        pytest.raises(OptionError, match="split_stages"),
    ):
        vllm_linear.ColumnParallelLinear(
            K,
            70,
            quant_config=config_of({"o": random_factors(K, 40, 70)}, {}),
            prefix="block.o",
            disable_tp=True,
        )
