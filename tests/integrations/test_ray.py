"""Tasks of Ray: whose result counts, and what becomes of the others. That they work is tested end to end."""

from itertools import count
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")
from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError  # noqa: E402

from dbf_compile.errors import OptionError, ResumeError  # noqa: E402
from dbf_compile.integrations import ray as ours  # noqa: E402


class Cluster:
    """A cluster whose tasks end one after the other, each as told; those behind the last ending never do.

    Args:
        *endings: what each task returns, or an exception.
    """

    def __init__(self, *endings):
        self.endings, self.numbers, self.cancelled, self.patience = endings, count(), [], []

    def remote(self, **_resources):
        return lambda _call: SimpleNamespace(remote=lambda _function: next(self.numbers))

    def wait(self, running, num_returns=1, timeout=None):
        if timeout is not None:
            self.patience.append(timeout)
        ended = [one for one in running if one < len(self.endings)][:num_returns]
        return ended, [one for one in running if one not in ended]

    def get(self, one):
        if isinstance(self.endings[one], BaseException):
            raise self.endings[one]
        return self.endings[one]

    def cancel(self, one, force):
        self.cancelled += [one] * force


@pytest.fixture
def run(monkeypatch):
    def run(cluster, tasks):
        monkeypatch.setattr(ours, "ray", cluster)
        return ours.first_result(lambda: None, tasks, 1, 0)

    return run


def test_the_first_result_counts_and_who_finds_no_place_is_ended(run):
    cluster = Cluster("first", "second")
    assert run(cluster, 4) == "first"
    assert cluster.cancelled == [2, 3] and cluster.patience == [ours._GRACE]


@pytest.mark.parametrize("loss", [WorkerCrashedError(), NodeDiedError("gone")], ids=["worker", "machine"])
def test_a_task_that_is_lost_does_not_stop_the_others(run, loss, caplog):
    assert run(Cluster(loss, "second"), 2) == "second"
    assert "a task was lost, and 1 go on" in caplog.text


def test_all_tasks_lost_are_said(run):
    with pytest.raises(ResumeError, match=r"2 tasks that were lost.*is kept"):
        run(Cluster(WorkerCrashedError(), WorkerCrashedError()), 2)


def test_an_error_of_a_task_stays_what_it_is_and_ends_the_others(run):
    error = OptionError("bits=0", "more", "choose")
    cluster = Cluster(RayTaskError("compress", "a traceback", error))
    with pytest.raises(OptionError) as raised:
        run(cluster, 3)
    assert raised.value is error and cluster.cancelled == [1, 2]
