"""Energy of a token: a long run of a model minus a short one, idle power subtracted, models in turns.

    joules a token = ((E_long - E_short) - P_idle · (t_long - t_short)) / (tokens_long - tokens_short)

What both runs do once, such as prefill, cancels. A counter that is missing gives None and a reason, never zero.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dbf_compile.calibration.model_io import vocabulary_of
from dbf_compile.counters import Meter, Use
from dbf_compile.errors import OptionError
from dbf_compile.generation import TextGenerator
from dbf_compile.machine import chosen_device
from dbf_compile.progress import bar, say

IDLE_SECONDS = 2.0
# Counters are renewed now and then, NVML's about ten times a second: a long run is repeated until it takes so long.
_RUN_SECONDS = 4.0
_SHORT = 8  # a short run has an eighth of the tokens


@dataclass(frozen=True)
class TokenEnergy:
    """The energy of a new token; medians over rounds.

    Attributes:
        joules: by counter ("package", "dram", "gpu"), idle power subtracted; None where it is missing. Close to nothing it may
            come out below zero.
        joules_with_idle: the same, with idle power.
        idle_watts: by counter.
        seconds: of a new token.
        rounds: ``joules`` of every round.
        missing: counters that are missing, and why.
    """

    joules: dict[str, float | None]
    joules_with_idle: dict[str, float | None]
    idle_watts: dict[str, float | None]
    seconds: float | None
    rounds: tuple[dict[str, float], ...]
    missing: dict[str, str]


def measure_energy(
    runs: Mapping[str, Callable[[int], object]],
    new_tokens: int,
    rounds: int = 5,
    *,
    meter: Meter | None = None,
    idle_seconds: float = IDLE_SECONDS,
    progress: bool = False,
) -> dict[str, TokenEnergy]:
    """Measure the energy of new tokens, of several programs in turns.

    Args:
        runs: by name, functions that generate a number of tokens; nothing else may keep the machine busy.
        new_tokens: of a long run, 2 or more; a short one has an eighth.
        rounds: repetitions; one round measures the idle machine, then every program once.
        meter: what measures; None for the counters of the processor.
        idle_seconds: how long a round measures the idle machine.
        progress: say on stderr what goes on.

    Returns:
        The energy by name.

    Raises:
        OptionError: fewer than 2 tokens, or no rounds.
    """
    if new_tokens < 2 or rounds < 1:
        raise OptionError(
            f"{new_tokens} tokens and {rounds} rounds", "2 tokens or more, 1 round or more", "raise them"
        )
    meter = Meter.of(torch.device("cpu")) if meter is None else meter
    for name, reason in meter.missing.items():
        say(f"no energy of {name}: {reason}", progress)
    if not meter.names:
        return _figures({name: [] for name in runs}, [], meter)
    short = max(1, new_tokens // _SHORT)
    repeats = {}
    for name, run in runs.items():
        say(f"warming up {name}", progress)
        repeats[name] = _warmed_up(run, short, new_tokens)
    idle: list[Use] = []
    pairs: dict[str, list[_Pair]] = {name: [] for name in runs}
    with bar("measuring energy", rounds * (1 + 2 * len(runs)), "run", progress) as moving:
        for _ in range(rounds):
            idle.append(meter.measure(lambda: time.sleep(idle_seconds)))
            moving.update(1)
            for name, run in runs.items():
                uses = []
                for tokens in (short, new_tokens):
                    uses.append(meter.measure(_repeated(run, tokens, repeats[name])))
                    moving.update(1)
                pairs[name].append(_Pair(uses[0], uses[1], repeats[name] * (new_tokens - short), idle[-1]))
    for counter in meter.names:
        if not any(pair.moves(counter) for own in pairs.values() for pair in own):
            meter.lose(counter, "the counter stands still")
    return _figures(pairs, idle, meter)


def energy_of_models(
    models: Sequence[str | Path],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int = 5,
    device: torch.device | str | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, TokenEnergy]:
    """Measure the energy of a new token of models in turns.

    Args:
        models: folders or names on the Hub.
        prompt_tokens: length of a prompt of random tokens.
        new_tokens, rounds: as for :func:`measure_energy`.
        device: where to compute; None for a GPU if there is one.
        progress: say on stderr what goes on.
        trust_remote_code: run code that comes with the models.
    """
    meter = Meter.of(chosen_device(device))
    runs: dict[str, Callable[[int], object]] = {str(name): lambda tokens: None for name in models}
    if meter.names:  # else nothing runs
        for name in models:
            generator = TextGenerator(
                name, device=device, trust_remote_code=trust_remote_code, progress=progress
            )
            runs[str(name)] = _generation(generator, prompt_tokens)
    return measure_energy(runs, new_tokens, rounds, meter=meter, progress=progress)


def _generation(generator: TextGenerator, prompt_tokens: int) -> Callable[[int], object]:
    words = len(generator.tokenizer)
    vocabulary = min(words, vocabulary_of(generator.model) or words)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    return lambda tokens: generator.generate(prompt, max_new_tokens=tokens, eos_token_id=-1)


@dataclass(frozen=True)
class _Pair:
    """A short run and a long one, by how many tokens they differ, and the idle machine just before."""

    short: Use
    long: Use
    tokens: int
    idle: Use

    def seconds(self) -> float:
        return (self.long.seconds - self.short.seconds) / self.tokens

    def joules(self, counter: str) -> float:
        """Return what a token takes, idle power included."""
        return (self.long.joules[counter] - self.short.joules[counter]) / self.tokens

    def net(self, counter: str) -> float:
        return self.joules(counter) - _watts(self.idle, counter) * self.seconds()

    def moves(self, counter: str) -> bool:
        return any(use.joules[counter] for use in (self.short, self.long, self.idle))


def _watts(use: Use, counter: str) -> float:
    return use.joules[counter] / use.seconds


def _warmed_up(run: Callable[[int], object], short: int, long: int) -> int:
    """Return how often a run must be repeated to take long enough, once everything is compiled."""
    run(short)
    run(long)
    began = time.perf_counter()
    run(long)
    return max(1, math.ceil(_RUN_SECONDS / max(time.perf_counter() - began, 1e-3)))


def _repeated(run: Callable[[int], object], tokens: int, times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            run(tokens)

    return repeated


def _figures(pairs: Mapping[str, list[_Pair]], idle: list[Use], meter: Meter) -> dict[str, TokenEnergy]:
    """Return medians by the counters that have counted throughout."""
    lost: dict[str, float | None] = dict.fromkeys(meter.missing)

    def medians(value: Callable[[_Pair, str], float], own: list[_Pair]) -> dict[str, float | None]:
        return {name: statistics.median(value(pair, name) for pair in own) for name in meter.names} | lost

    watts: dict[str, float | None] = {
        name: statistics.median(_watts(use, name) for use in idle) for name in meter.names
    }
    return {
        run: TokenEnergy(
            joules=medians(_Pair.net, own),
            joules_with_idle=medians(_Pair.joules, own),
            idle_watts=watts | lost,
            seconds=statistics.median(pair.seconds() for pair in own) if own else None,
            rounds=tuple({name: pair.net(name) for name in meter.names} for pair in own),
            missing=dict(meter.missing),
        )
        for run, own in pairs.items()
    }
