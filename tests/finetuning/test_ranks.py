"""Ranks: which windows a process takes; alone it takes all, and sums are what they were."""

import torch

from dbf_compile.finetuning.ranks import Ranks, joined


def test_shares_are_all_windows_once():
    windows = torch.arange(7)
    shares = [Ranks(rank, 3).share(windows).tolist() for rank in range(3)]
    assert sorted(window for share in shares for window in share) == windows.tolist()
    assert [len(share) for share in shares] == [3, 2, 2]


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as ranks:
        assert ranks == Ranks(0, 1)
        total = torch.ones(2)
        ranks.sum_([total])
        ranks.wait()
        assert total.tolist() == [1, 1] and ranks.broadcast("x") == "x"
    monkeypatch.setenv("WORLD_SIZE", "2")  # of something else than a launcher of processes
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with joined(torch.device("cpu")) as ranks:
        assert ranks.size == 1 and not torch.distributed.is_initialized()
