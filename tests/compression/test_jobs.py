"""Jobs: what is put together, and what is told while they run."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from dbf_compile.compression import jobs as jobs_module
from dbf_compile.compression.cache import CachedStore, FactorCache
from dbf_compile.compression.jobs import FactorJob, Pool, _batches, run_jobs
from dbf_compile.errors import WeightError
from dbf_compile.factorizer.factorize import FactorizerConfig, weighted_error
from dbf_compile.factorizer.importance import Importance

QUICK = FactorizerConfig(iterations=5)


def job(name, rows=6, columns=8, mid_features=4, importance=None, device="cpu"):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(ord(name)), device="cpu")
    return FactorJob((name,), (weight.to(device),), importance, mid_features)


def factored(jobs, cache, progress=False):
    store = CachedStore(cache, QUICK)
    run_jobs(jobs, QUICK, store, progress)
    return [store.get(one) for one in jobs]


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


def test_every_job_has_its_factors_and_they_are_kept(tmp_path, monkeypatch):
    jobs = [job("a", rows=9), job("b", rows=3), job("c", rows=5)]
    cache = FactorCache(tmp_path)
    factors = factored(jobs, cache)
    assert [item.out_features for item in factors] == [9, 3, 5]
    assert all(weighted_error(item.weights[0], one) < 1 for item, one in zip(jobs, factors, strict=True))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    monkeypatch.setattr(jobs_module, "factorize_batch", lambda *_, **__: pytest.fail("factored twice"))
    again = factored(jobs, cache)
    assert all(torch.equal(one.signs_in, other.signs_in) for one, other in zip(factors, again, strict=True))


def test_equal_content_is_factored_once(tmp_path, monkeypatch):
    calls = []
    factorize_batch = jobs_module.factorize_batch
    monkeypatch.setattr(
        jobs_module, "factorize_batch", lambda *a, **k: calls.append(1) or factorize_batch(*a, **k)
    )
    one, other = factored([job("a"), replace(job("a"), names=("b",))], FactorCache(tmp_path))
    assert len(calls) == 1 and torch.equal(one.signs_in, other.signs_in)


def test_progress_shows_how_much_is_left_and_ends_full(tmp_path, capsys):
    factored([job("a"), job("b", rows=12)], FactorCache(tmp_path), progress=True)
    shown = capsys.readouterr().err
    assert "factoring: 100%" in shown and "144/144" in shown


def test_a_failure_names_its_layers(tmp_path):
    bad = FactorJob(("x.q", "x.k"), (torch.ones(2, 3), torch.full((2, 3), float("nan"))), None, 2)
    with pytest.raises(WeightError, match=r"x\.q \+ x\.k"):
        factored([bad], FactorCache(tmp_path))


def test_when_one_worker_fails_the_others_stop(tmp_path):
    bad = FactorJob(("bad",), (torch.full((2, 3), float("nan")),), None, 2)
    endless = FactorizerConfig(iterations=10**9)
    store = CachedStore(FactorCache(tmp_path), endless)
    with pytest.raises(WeightError, match="bad"):
        run_jobs([job("a"), bad], endless, store, False, Pool(workers=2))


def test_the_number_of_threads_is_restored(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        store = CachedStore(FactorCache(tmp_path), QUICK)
        run_jobs([job("a"), job("b")], QUICK, store, False, Pool(workers=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_results_of_other_processes_are_waited_for(tmp_path):
    jobs = [job("a"), job("b")]
    config, results, claims = QUICK, {}, []

    class Shared(CachedStore):
        """A store in which another process holds the claim of the first job, and finishes later."""

        def has(self, key):
            return key in results

        @contextmanager
        def claim(self, keys):
            claims.append(keys)
            held = self.key(jobs[0])
            if len(claims) == 4:
                results[held] = "made elsewhere"
            yield [key for key in keys if key not in results and key != held]

        def put(self, key, job, factors, seconds):
            results[key] = factors

    store = Shared(FactorCache(tmp_path), config)
    run_jobs(jobs, config, store, False, Pool(workers=1))
    assert results[store.key(jobs[0])] == "made elsewhere" and len(results) == 2
    assert len(claims) >= 4


def test_batches_do_not_depend_on_what_is_there_already():
    jobs = {name: job(name, device="meta") for name in "abcd"}
    assert [[key for key, _ in batch] for batch in _batches(jobs)] == [["a", "b", "c", "d"]]
    pool = Pool(workers=1, device=torch.device("meta"))
    on_cpu = {name: job(name) for name in "abcd"}
    assert [[key for key, _ in batch] for batch in _batches(on_cpu, pool)] == [["a", "b", "c", "d"]]


def test_a_batch_is_factored_whole_and_stores_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "_batches", lambda jobs, pool: [list(jobs.items())])
    jobs = [job("a"), job("b"), job("c")]
    store = CachedStore(FactorCache(tmp_path), QUICK)
    run_jobs(jobs, QUICK, store, False)
    expected = [store.get(one) for one in jobs]
    removed = store._cache._path(store.key(jobs[1]))
    removed.unlink()
    sizes = []
    factorize_batch = jobs_module.factorize_batch
    monkeypatch.setattr(
        jobs_module, "factorize_batch", lambda w, *a, **k: sizes.append(len(w)) or factorize_batch(w, *a, **k)
    )
    again = CachedStore(FactorCache(tmp_path), QUICK)
    run_jobs(jobs, QUICK, again, False)
    assert sizes == [3] and removed.exists()
    assert all(
        torch.equal(again.get(one).signs_in, old.signs_in) for one, old in zip(jobs, expected, strict=True)
    )


@pytest.mark.parametrize("folder", ["occupied", "/proc/nothing", "/dev/full/nothing"])
def test_factors_that_cannot_be_kept_are_returned_with_one_warning(tmp_path, caplog, folder):
    (tmp_path / "occupied").write_text("a file where a folder should be")
    expected = factored([job("a"), job("b", rows=12)], FactorCache(tmp_path / "works"))
    caplog.clear()
    results = factored([job("a"), job("b", rows=12)], FactorCache(tmp_path / folder))
    assert all(
        torch.equal(one.signs_out, other.signs_out) for one, other in zip(results, expected, strict=True)
    )
    assert len(caplog.records) == 1 and "not kept in the cache" in caplog.text


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "folder"])
def test_a_file_of_the_cache_that_cannot_be_read_counts_as_absent(tmp_path, caplog, content):
    cache = FactorCache(tmp_path)
    (expected,) = factored([job("a")], cache)
    (path,) = tmp_path.rglob("*.safetensors")
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (again,) = factored([job("a")], FactorCache(tmp_path))
    assert torch.equal(again.signs_out, expected.signs_out)
    assert len(caplog.records) == 1


def test_the_number_of_threads_is_restored_by_the_last_of_several_pools():
    before = torch.get_num_threads()
    with jobs_module._threads(1, 1) as first:
        first.submit(int).result()
        with jobs_module._threads(1, 1) as second:
            second.submit(int).result()
    assert torch.get_num_threads() == before
