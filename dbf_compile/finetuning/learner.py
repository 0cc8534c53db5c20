"""The student and all that learns in it: factors, norms and biases; a step of training, and what to keep of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import logits_of
from dbf_compile.calibration.offload import without_kv_cache
from dbf_compile.errors import TrainingError
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.finetuning.adam import RelativeAdam
from dbf_compile.finetuning.loss import divergence, hidden_error
from dbf_compile.finetuning.ranks import Ranks
from dbf_compile.finetuning.student import small_parameters, stacks_of, write_out_
from dbf_compile.finetuning.targets import Teacher
from dbf_compile.finetuning.weights import LearningWeight
from dbf_compile.options import FinetuneConfig

State = dict[str, Tensor]
_KEPT = 2**30  # numbers that layers read and write in a forward pass, in groups of more than one window
_LEARNED = ("small", "factors")  # the parts of a state that are the model


class Rates(NamedTuple):
    """How far a step goes.

    Args:
        scales, norms: how far scales move, and norms and biases, in units of their size.
        signs: share of the signs that may flip; 0 in most steps, as flips gather.
        kept: how much of the remembered gradient stays.
    """

    scales: float
    norms: float
    signs: float = 0.0
    kept: float = 0.0


class Learner:
    """A compressed model that learns the predictions of the dense one.

    Args:
        model: the compressed model, which becomes the student.
        teacher: the dense model's predictions.
        config: rates, and what learns.
        dtype: of the training.
        ranks: the processes that share a step.
    """

    def __init__(
        self, model: nn.Module, teacher: Teacher, config: FinetuneConfig, dtype: torch.dtype, ranks: Ranks
    ) -> None:
        self._model, self._teacher, self._config, self._ranks = model, teacher, config, ranks
        self._weights = [
            LearningWeight(
                {name: layer.factors for name, layer in stack.items()}, dtype, config.sign_rate > 0
            )
            for stack in stacks_of(model)
        ]
        small = small_parameters(model) if config.norm_rate else {}
        small = {name: value for name, value in small.items() if not _is_of_factors(name)}
        self._small = {name: value.detach().float().clone() for name, value in small.items()}
        self._layers = write_out_(model, dtype)
        self._copies = {name: model.get_parameter(name) for name in self._small}
        self._adam = RelativeAdam(self._small)
        self._gradients: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            self._collect(name, layer.weight)
        for name, copy in self._copies.items():
            self._collect(name, copy.requires_grad_(True))
        self._write()
        model.eval()  # dropout is no part of the dense model's predictions

    def step(self, windows: Tensor, rates: Rates) -> tuple[float, int]:
        """Learn from the windows of one step.

        Args:
            windows: int64 [windows, length], the same in every process.
            rates: of this step.

        Returns:
            The mean loss in nats, and how many signs flipped.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self._teacher.device)
        for gradient in self._gradients.values():
            gradient.zero_()
        with torch.enable_grad():
            for group in self._groups(self._ranks.share(windows)):
                error = self._loss(group) / windows.numel()
                error.backward()
                loss += float(error.detach())
        self._ranks.sum_([loss, *self._gradients.values()])
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"training with a loss of {float(loss)}",
                "a finite loss",
                "use smaller rates, and another output or resume='never'",
            )
        flips = self._update(rates)
        self._write()
        return float(loss), flips

    @torch.no_grad()
    def divergence(self, windows: Tensor) -> float:
        """Return the mean KL from the dense model on windows, in nats."""
        total = torch.zeros((), dtype=torch.float64, device=self._teacher.device)
        for group in self._groups(self._ranks.share(windows)):
            logits, _ = self._predicted(group)
            total += float(divergence(logits, self._teacher.targets(group)))
        self._ranks.sum_([total])
        return float(total) / windows.numel()

    @property
    def signs(self) -> int:
        """The number of signs."""
        return sum(weight.signs for weight in self._weights)

    def factors(self) -> dict[str, DoubleBinaryFactors]:
        """Return the factors of all layers by name."""
        return {name: one for weight in self._weights for name, one in weight.factors().items()}

    def small(self) -> dict[str, Tensor]:
        """Return norms and biases by name, float32."""
        return self._small

    def learned(self) -> State:
        """Return the part of the state that is the model: factors, norms and biases."""
        state = self.state()
        return {name: state[name].cpu() for name in state if name.partition("/")[0] in _LEARNED}

    def state(self) -> State:
        """Return all that the next step depends on, by name; tensors are those in use."""
        state = {f"small/{name}": value for name, value in self._small.items()}
        state |= {f"moments/{name}": value for name, value in self._adam.state().items()}
        for weight in self._weights:
            name = weight.names[0]
            state |= {f"factors/{name}.{part}": tensor for part, tensor in weight.learned().items()}
            state |= {f"moments/{name}.{part}": tensor for part, tensor in weight.moments().items()}
        return state

    @torch.no_grad()
    def take_(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, or the part of one that is there."""
        own = self.state()
        for name, tensor in state.items():
            own[name].copy_(tensor)
        self._write()

    def _collect(self, name: str, parameter: Tensor) -> None:
        """Add up the gradients of a parameter in float32; those of torch would be rounded with every addition."""
        total = torch.zeros(parameter.shape, device=parameter.device)
        self._gradients[name] = total

        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add)

    def _groups(self, windows: Tensor) -> Sequence[Tensor]:
        """Split windows into groups whose activations are kept at once; one window after the other took a third longer."""
        numbers = windows.numel() * sum(sum(layer.weight.shape) for layer in self._layers.values())
        return windows.tensor_split(min(len(windows), -(-numbers // _KEPT))) if len(windows) else ()

    def _predicted(self, windows: Tensor) -> tuple[Tensor, Any]:
        """Return logits [T, V] of windows, and the output they are of."""
        hidden = {"output_hidden_states": True} if self._config.hidden and torch.is_grad_enabled() else {}
        with without_kv_cache(self._model):
            output = self._model(input_ids=windows.to(self._teacher.device), **hidden)
        return logits_of(output).flatten(0, 1), output

    def _loss(self, windows: Tensor) -> Tensor:
        """Return the loss of windows, the sum over their positions."""
        logits, output = self._predicted(windows)
        loss = divergence(logits, self._teacher.targets(windows))
        if self._config.hidden:
            target = self._teacher.hidden_states(windows)
            loss = loss + self._config.hidden * hidden_error(output.hidden_states, target)
        return loss

    @torch.no_grad()
    def _update(self, rates: Rates) -> int:
        flips = 0
        for weight in self._weights:
            gradient = torch.cat([self._gradients[name] for name in weight.names])
            flips += weight.step(gradient, rates.scales, rates.kept, rates.signs)
        self._adam.step({name: self._gradients[name] for name in self._small}, rates.norms)
        return flips

    @torch.no_grad()
    def _write(self) -> None:
        for weight in self._weights:
            dense = weight.dense().split(weight.rows)
            for name, part in zip(weight.names, dense, strict=True):
                self._layers[name].weight.copy_(part)
        for name, copy in self._copies.items():
            copy.copy_(self._small[name])


def _is_of_factors(name: str) -> bool:
    return name.rpartition(".")[2] in ("scale_in", "scale_mid", "scale_out")
