"""The state of weights, and the memory of their factors."""

import multiprocessing
import threading

import torch
from support.compiled import compiled
from support.models.tiny import MLP, randn

from dbf_compile.compiler.factored import FactorMemory, WeightState, addresses_of
from dbf_compile.compiler.graph_weights import memory


def test_a_state_sees_writes_however_they_are_done():
    for write in (
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.numpy().fill(1),
        lambda weight: weight.T.zero_(),
    ):
        weights = [randn(4, 5), randn(3, 7).T]
        state = WeightState(weights)
        assert state.matches(weights)
        write(weights[1])
        assert not state.matches(weights)


def test_a_state_knows_whether_its_weights_live():
    weight = randn(4, 5)
    state, view = WeightState([weight]), weight[:]
    assert addresses_of([weight]) == addresses_of([view])
    del weight
    assert state.is_alive()  # the view reads the same memory
    del view
    assert not state.is_alive()


def test_the_factors_of_weights_that_are_gone_are_forgotten():
    memory.clear()
    for seed in range(3):
        torch.compiler.reset()
        compiled(MLP(seed=seed))(randn(5, 67))
        assert len(memory) == 2


def test_a_process_that_is_forked_while_another_thread_factors_goes_on():
    forks = FactorMemory()
    locked, done = threading.Event(), threading.Event()

    def hold():
        with forks._lock:
            locked.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    child = multiprocessing.get_context("fork").Process(target=forks.clear)
    child.start()
    child.join(20)
    done.set()
    thread.join()
    assert child.exitcode == 0
