"""Jobs: what is put together, and what is told while they run."""

import pytest
import torch

from dbf_compile.compression.cache import FactorCache
from dbf_compile.compression.jobs import FactorJob, _batches, run_jobs
from dbf_compile.errors import WeightError
from dbf_compile.factorizer.factorize import FactorizerConfig, weighted_error
from dbf_compile.factorizer.importance import Importance

QUICK = FactorizerConfig(iterations=5)


def job(name, rows=6, columns=8, mid_features=4, importance=None, device="cpu"):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(ord(name)), device="cpu")
    return FactorJob((name,), (weight.to(device),), importance, mid_features)


def sizes(jobs):
    return sorted(len(batch) for batch in _batches({str(index): item for index, item in enumerate(jobs)}))


def test_a_core_of_a_cpu_takes_one_weight_at_a_time():
    assert sizes([job(name) for name in "abc"]) == [1, 1, 1]


def test_small_weights_of_one_kind_on_an_accelerator_go_together():
    alike = [job(name, device="meta") for name in "abc"]
    assert sizes(alike) == [3]
    assert sizes([*alike, job("d", rows=7, device="meta"), job("e", mid_features=5, device="meta")]) == [
        1,
        1,
        3,
    ]
    whole = Importance(torch.eye(8))
    assert sizes([*alike, job("d", importance=whole, device="meta")]) == [1, 3]
    assert sizes([*alike, job("d", importance=whole.diagonal(), device="meta")]) == [4]


def test_large_weights_on_an_accelerator_go_alone():
    large = [FactorJob((name,), (torch.empty(4096, 4096, device="meta"),), None, 64) for name in "ab"]
    assert sizes(large) == [1, 1]


def test_results_come_in_the_order_of_the_jobs_and_are_kept(tmp_path):
    jobs = [job("a", rows=9), job("b", rows=3), job("c", rows=5)]
    cache = FactorCache(tmp_path)
    made = run_jobs(jobs, QUICK, cache, progress=False)
    assert [item.out_features for item in made] == [9, 3, 5]
    assert all(weighted_error(item.weights[0], factors) < 1 for item, factors in zip(jobs, made, strict=True))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    again = run_jobs(jobs, QUICK, cache, progress=False)
    assert all(torch.equal(one.signs_in, other.signs_in) for one, other in zip(made, again, strict=True))


def test_progress_shows_how_much_is_left_and_ends_full(tmp_path, capsys):
    run_jobs([job("a"), job("b", rows=12)], QUICK, FactorCache(tmp_path), progress=True)
    shown = capsys.readouterr().err
    assert "factoring: 100%" in shown and "144/144" in shown


def test_a_failure_names_its_layers(tmp_path):
    bad = FactorJob(("x.q", "x.k"), (torch.ones(2, 3), torch.full((2, 3), float("nan"))), None, 2)
    with pytest.raises(WeightError, match=r"x\.q \+ x\.k"):
        run_jobs([bad], QUICK, FactorCache(tmp_path), progress=False)
