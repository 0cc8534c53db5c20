"""The loop of finetuning: step after step over fresh text, judged on the way, kept so that a run that stops goes on.

    <output>.work/state.safetensors    all that the next step depends on, after some step
    <output>.work/best.safetensors     factors, norms and biases of the best state that was judged

Both are replaced whole. Nothing else carries over from step to step, so a run that goes on ends with the same bits.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dbf_compile.checkpoint import write_tensors
from dbf_compile.finetuning.learner import Learner, Rates
from dbf_compile.finetuning.ranks import Ranks
from dbf_compile.finetuning.text import Text
from dbf_compile.options import FinetuneConfig
from dbf_compile.progress import bar, over, say

STATE, BEST = "state.safetensors", "best.safetensors"
_WARM_UP = 0.03  # of all steps
_REMEMBERED = 2**16  # tokens; what fewer say about a sign of a real model is next to noise
_LEAST_MEMORIES = 4  # that a run has, however short
_FLIPS = 4  # times that signs flip while one gradient is remembered
_BETWEEN_STATES = 300.0  # seconds
_LOST = 1.5  # times the divergence at the start: no run was seen to come back from there
_COURSE = "course"  # in the header of a state


@dataclass
class Course:
    """Where a run is.

    Args:
        steps: done.
        flips: signs that have flipped, those that flipped back counted again.
        judged: divergence by kind of text, after so many steps.
        best: steps of the best state; 0 is the start.
        seconds: of training.
    """

    steps: int = 0
    flips: int = 0
    judged: dict[str, dict[str, float]] = field(default_factory=dict)
    best: int = 0
    seconds: float = 0.0

    def judge(self, divergences: Mapping[str, float]) -> bool:
        """Note divergences by kind; return whether the state is the best so far.

        That is the smallest mean over the kinds of those states in which no kind is worse than at the start.
        """
        first, best = (self.judged.get(str(steps)) for steps in (0, self.best))
        self.judged[str(self.steps)] = dict(divergences)
        if first is None or best is None:
            return True
        better = sum(divergences.values()) < sum(best.values())
        if better and all(divergences[kind] <= first[kind] for kind in first):
            self.best = self.steps
            return True
        return False

    @property
    def is_lost(self) -> bool:
        """Whether the mean over the kinds is so much larger than at the start that going on is a waste of time."""
        first, last = (sum(self.judged[str(steps)].values()) for steps in (0, self.steps))
        return not last <= _LOST * first


class Training:
    """A run of finetuning.

    Args:
        learner: what learns.
        text: what it learns from.
        config: length and rates.
        folder: where states lie.
        ranks: the processes of the run; the first one writes.
    """

    def __init__(
        self, learner: Learner, text: Text, config: FinetuneConfig, folder: Path, ranks: Ranks
    ) -> None:
        self._learner, self._text, self._config = learner, text, config
        self._folder, self._ranks = folder, ranks
        self._steps = -(-len(text.learning) // config.batch)
        self._course = Course()

    def run(self) -> Course:
        """Train to the end of the text; the learner ends with what it had learned when it was best."""
        if (self._folder / STATE).exists() and (self._folder / BEST).exists():
            state, facts = _read(self._folder / STATE)
            self._learner.take_(state)
            self._course = Course(**facts)
        else:
            self._judge()
            self._save()
        self._train()
        self._ranks.wait()
        state, _ = _read(self._folder / BEST)
        self._learner.take_(state)
        return self._course

    def _train(self) -> None:
        course, config = self._course, self._config
        judge_at = {-(-self._steps * part // config.judge) for part in range(1, config.judge + 1)}
        windows = self._text.learning
        began = time.monotonic()
        with bar("finetuning", windows.numel(), "token", config.progress) as moving:
            moving.update(windows[: course.steps * config.batch].numel())
            while course.steps < self._steps:
                part = windows[course.steps * config.batch :][: config.batch].long()
                rates = rates_at(config, course.steps, self._steps, windows[: config.batch].numel())
                loss, flips = self._learner.step(part, rates)
                course.steps, course.flips = course.steps + 1, course.flips + flips
                flipped = course.flips / self._learner.signs
                moving.set_postfix_str(f"loss {loss:.3f}, flips {flipped:.2%}", refresh=False)
                moving.update(part.numel())
                is_judged, now = course.steps in judge_at, time.monotonic()
                if is_judged:
                    self._judge()
                    if course.is_lost:
                        return self._give_up()
                if is_judged or now - began > _BETWEEN_STATES:
                    course.seconds += now - began
                    began = now
                    self._save()

    def _give_up(self) -> None:
        """Say why a run ends here; nothing of what followed the best state is kept."""
        if self._ranks.rank == 0:
            warnings.warn(
                f"finetuning diverges: after {self._course.steps} of {self._steps} steps the KL on text kept back is more than "
                f"{_LOST} times that of the start. The run ends; use a smaller sign_rate and scale_rate",
                stacklevel=7,
            )

    def _judge(self) -> None:
        """Judge the state, and keep it if it is the best."""
        judging = over(self._text.judging.items(), "judging", "kind", self._config.progress)
        divergences = {kind: self._learner.divergence(windows.long()) for kind, windows in judging}
        is_best = self._course.judge(divergences)
        by_kind = ", ".join(f"{kind} {value:.4f}" for kind, value in divergences.items())
        say(
            f"step {self._course.steps} of {self._steps}: KL from the dense model {by_kind}{' (best)' if is_best else ''}",
            self._config.progress,
        )
        if is_best and self._ranks.rank == 0:
            write_tensors(self._learner.learned(), {}, self._folder / BEST)

    def _save(self) -> None:
        if self._ranks.rank == 0:
            state = {name: tensor.cpu() for name, tensor in self._learner.state().items()}
            write_tensors(state, {_COURSE: json.dumps(asdict(self._course))}, self._folder / STATE)


def rate_share(step: int, steps: int) -> float:
    """Return what part of the largest rate a step has: a short rise, then half a cosine to zero."""
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def rates_at(config: FinetuneConfig, step: int, steps: int, tokens: int) -> Rates:
    """Return the rates of a step.

    Args:
        config: the largest rates.
        step, steps: which of how many.
        tokens: of a step.
    """
    share = rate_share(step, steps)
    memory = max(1.0, min(_REMEMBERED / tokens, steps / _LEAST_MEMORIES))  # steps
    every = math.ceil(memory / _FLIPS)
    done = step + 1
    flips = done % every == 0 and done >= memory  # what the first steps alone say is noise
    signs = config.sign_rate * share * every * tokens / 1e6 if flips else 0.0
    return Rates(share * config.scale_rate, share * config.norm_rate, signs, math.exp(-1 / memory))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state, and the course; the folder was checked when it was opened."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads((file.metadata() or {}).get(_COURSE, "{}"))
