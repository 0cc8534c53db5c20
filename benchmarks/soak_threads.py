"""Eight threads call four compiled models while weights change: every answer is that of its model and its weights."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random

import torch
from soak_cases import Campaign, Case, in_processes, one_line
from torch import Tensor, nn

import dbf_compile
from dbf_compile.compiler import backend  # noqa: F401  # children find it imported

THREADS = 8
CALLS = 20_000  # of one process: the first calls of all threads compile at once, in every process
CHANGE_EVERY = 500  # calls, on average
BATCHES = (1, 4, 7)
WIDTH = 40
OPTIONS = {"bits_per_weight": 4.0, "iterations": 4, "progress": False}
TOLERANCE = 1e-3  # float32 sums in another order; the answers of other weights differ by about 1
SECONDS = 1800


class MLP(nn.Module):
    """Two layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 70), nn.Linear(70, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Gated(nn.Module):
    """Three layers, two of one input: their names let ``convert_`` factor them as one, as the compiler does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 50), nn.Linear(WIDTH, 50)
        self.down_proj = nn.Linear(50, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Served:
    """A compiled model, its inputs, and its answers in two states of its weights.

    Args:
        model: dense; it is compiled as it is, or factored first.
        factored: factor it first.
        generator: of the inputs and of the other state.
    """

    def __init__(self, model: nn.Module, factored: bool, generator: torch.Generator) -> None:
        model.requires_grad_(False).eval()
        self.inputs = [torch.randn(batch, WIDTH, generator=generator) for batch in BATCHES]
        others = copy.deepcopy(model)
        for weight in others.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
        eager = [dbf_compile.convert_(copy.deepcopy(one), **OPTIONS) for one in (model, others)]
        self.answers = [[one(x) for x in self.inputs] for one in eager]
        if factored:
            model = copy.deepcopy(eager[0])
        self.states = [
            [tensor.clone() for tensor in one.state_dict().values()]
            for one in (eager if factored else (model, others))
        ]
        self.tensors = list(model.state_dict().values())
        self.compiled = torch.compile(model, backend="dbf", options=OPTIONS)
        self.state, self._callers, self._condition = 0, 0, threading.Condition()

    @contextmanager
    def calling(self) -> Iterator[int]:
        """Yield the state of the weights, which stay as they are within the block."""
        with self._condition:
            self._callers += 1
            state = self.state
        try:
            yield state
        finally:
            with self._condition:
                self._callers -= 1
                self._condition.notify_all()

    def change(self) -> None:
        """Write the weights of the other state in place, while nobody calls."""
        with self._condition:
            self._condition.wait_for(lambda: self._callers == 0)
            self.state = 1 - self.state
            for tensor, content in zip(self.tensors, self.states[self.state], strict=True):
                tensor.copy_(content)


def run(seeds: Iterable[int], quick: bool) -> Iterator[Case]:
    """Yield one process of many calls for each seed."""
    torch.set_num_threads(1)
    calls = CAMPAIGN.quick if quick else CALLS
    yield from in_processes(seeds, partial(_case, calls), slots=1, timeout=SECONDS)


def _case(calls: int, seed: int) -> Case:
    logging.getLogger("dbf_compile").setLevel(logging.ERROR)  # a changed weight is said each time
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    kinds = (MLP, MLP, Gated, MLP)
    with torch.no_grad():
        models = [Served(kind(), index == 3, generator) for index, kind in enumerate(kinds)]
    faults: list[str] = []
    threads = [
        threading.Thread(target=_call, args=(models, Random(f"{seed} {index}"), calls // THREADS, faults))
        for index in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    what = "four models, two of one class, and one factored before"
    if not faults:
        return Case(seed, what, "right answers", amount=calls)
    errors = sum(": " in fault for fault in faults)
    outcome = "ERRORS" if errors else "WRONG ANSWERS"
    detail = f"{len(faults)} of {calls}, {errors} of them errors, such as {max(faults, key=lambda fault: ': ' in fault)}"
    return Case(seed, what, outcome, True, detail, amount=calls)


def _call(models: list[Served], random: Random, calls: int, faults: list[str]) -> None:
    # Past the limit, calls run without the backend. Every thread has its own settings.
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        for number in range(calls):
            index = random.randrange(len(models))
            served = models[index]
            if random.randrange(CHANGE_EVERY) == 0:
                served.change()
            place = random.randrange(len(BATCHES))
            try:
                with served.calling() as state:
                    y = served.compiled(served.inputs[place])
                expected = served.answers[state][place]
                if not (y - expected).abs().max() <= TOLERANCE * expected.abs().max():
                    faults.append(f"call {number} of model {index} in state {state} with input {place}")
            except Exception as error:
                faults.append(f"call {number} of model {index}: {one_line(error)}")


CAMPAIGN = Campaign("calls", 1_000_000, 800, run)
