"""Calibration: what flows through each linear layer while a model reads sample batches.

    input_second_moment        E[x²] [K],         or E[x xᵀ] [K, K]       over all positions of all batches
    output_grad_second_moment  E[(∂loss/∂y)²] [N], or E[δ δᵀ] [N, N]      the same, with a loss; δ = ∂loss/∂y

Source: importances of Boža and Macko (arXiv 2505.11076), as in the authors' notebooks; they sum the means of
single sequences, here every position counts alike. Clipping of tokens as in NanoQuant.

Positions that a batch's ``attention_mask`` marks as padding do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dbf_compile.calibration.batches import random_batches
from dbf_compile.calibration.losses import Loss, attention_mask, loss_named
from dbf_compile.errors import ConversionError, DBFError, OptionError
from dbf_compile.factorizer.importance import Importance, diagonal_of
from dbf_compile.linear import dense_linears
from dbf_compile.machine import with_index
from dbf_compile.options import DENSE_BY_DEFAULT

FORMS = ("diagonal", "input", "kronecker")

_log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    loss: Loss | str | None = "auto",
    form: str = "diagonal",
    layers: Sequence[str] = ("*",),
    clip: float | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, Importance]:
    """Measure the importance of every dense linear layer that the batches reach.

    The model runs in evaluation mode and is left as it was: modes, hooks, gradients and parameters. Gradients
    flow through frozen models too, and none is kept. Equal arguments give equal results.

    Args:
        model: any module; its ``nn.Linear`` and Conv1D layers are measured.
        batches: tensors, sequences or mappings, called as ``model(t)``, ``model(*t)``, ``model(**t)``; see
            :func:`~dbf_compile.calibration.batches.token_batches`. None for the data-free mode: uniformly
            random tokens, for models whose configuration names a ``vocab_size``.
        loss: a name of :mod:`~dbf_compile.calibration.losses`, or a function of (output of the model, batch) to
            a scalar; None to measure inputs only, which needs no backward pass.
        form: "diagonal" for a vector per side; "input" for whole E[x xᵀ]; "kronecker" for whole matrices on both
            sides. From n positions, what lies off the diagonal of a matrix of d features is taken n / (n + d)
            times, as few positions exaggerate how features go together. A whole matrix takes K² (N²) numbers of 8
            bytes while it is measured: name few ``layers`` at a time where that is too much. Heads, which stay
            dense by default and are wide, have vectors.
        layers: patterns (``fnmatch``) of the names of the layers to measure.
        clip: quantile, such as 0.999, of a batch's token norms above which tokens are scaled down to it, so that
            no single one rules the statistics; None to take tokens as they are.
        device: where to compute. The model's blocks are moved there one at a time and back, everything else for
            as long as this takes; what a block has computed is computed again in the backward pass instead of
            being kept. None to compute where the model is, as a whole.
        seed: of random tokens and random losses.

    Returns:
        Layer name to importance, float32 on the device of the layer's input. Layers never reached are left out
        and named in a warning. Gradient moments of all layers are divided by one common number, so that layers
        can be compared.

    Raises:
        ConversionError: no batches, a batch of another type, a loss that is no scalar or has no gradient.
        OptionError: an unknown ``loss`` or ``form``, a ``clip`` outside of 0 to 1.
        WeightError: activations or gradients are NaN or overflow; the message names the layer.
    """
    if form not in FORMS:
        raise OptionError(f"form={form!r}", ", ".join(FORMS), "use 'diagonal', the paper's importance")
    if clip is not None and not 0 < clip < 1:
        raise OptionError(f"clip={clip!r}", "a number between 0 and 1", "0.999 is a usual value")
    generator = torch.Generator().manual_seed(seed)
    criterion = loss_named(loss, model, generator) if isinstance(loss, str) else loss
    if batches is None:
        batches = random_batches(model, generator)
    meters = {
        name: _Meter(
            Moment(_is_whole(name, form, ("input", "kronecker")), clip),
            Moment(_is_whole(name, form, ("kronecker",)), clip),
        )
        for name in dense_linears(model)
        if any(fnmatchcase(name, pattern) for pattern in layers)
    }
    # Every output gets this zero added. The gradient with respect to it passes through all outputs, where the
    # hooks read it, and is the only one computed: no parameter and no input accumulates a .grad.
    anchor = None if criterion is None else torch.zeros((), requires_grad=True)
    run = _Run(anchor)
    empty = True
    with (
        without_cache(model),
        _measuring(model, meters, run),
        block_by_block(model, list(blocks_of(model, meters).values()), device, run),
        torch.set_grad_enabled(criterion is not None),
    ):
        for batch in batches:
            empty = False
            if device is not None:
                batch = moved(batch, device)
            run.mask = attention_mask(batch)
            output = call_model(model, batch)
            if criterion is not None and anchor is not None:
                torch.autograd.grad(_scalar(criterion(output, batch)), anchor, allow_unused=True)
    if empty:
        raise ConversionError(
            "no batches to calibrate with",
            "one batch or more",
            "pass a list; a generator can be read only once",
        )
    missed = [name for name, meter in meters.items() if not meter.inputs.positions]
    if missed:
        _log.warning(
            "no batch reached these layers; all their features will count alike: %s", ", ".join(missed)
        )
    return _importances({name: meter for name, meter in meters.items() if meter.inputs.positions})


def _is_whole(name: str, form: str, forms: Sequence[str]) -> bool:
    return form in forms and not any(fnmatchcase(name, pattern) for pattern in DENSE_BY_DEFAULT)


@dataclass
class Moment:
    """A running second moment: the sum of squares, or of outer products, in float64 and how many were summed."""

    whole: bool = False
    clip: float | None = None
    total: Tensor | None = None
    positions: int = 0
    limit: float = 0.0

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values [..., features]; of positions that ``mask`` [...] leaves out nothing."""
        rows = values.detach()
        if mask is not None and rows.shape[:-1] == mask.shape:
            rows = rows[mask.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        if self.clip is not None:
            rows = self._clipped(rows)
        # float64 throughout: squares of small float16 gradients vanish in less.
        if self.whole:
            exact = rows.double()
            added = exact.mT @ exact
        else:
            added = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
        self.total = added if self.total is None else self.total + added.to(self.total.device)
        self.positions += rows.shape[0]

    def _clipped(self, rows: Tensor) -> Tensor:
        """Scale long rows down to the largest quantile of norms that any batch had so far."""
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if norms.numel() == 0 or not bool(torch.isfinite(norms).all()):
            return rows  # the importance made of it says which layer it is
        assert self.clip is not None
        place = min(norms.numel() - 1, int(self.clip * norms.numel()))
        limit = float(norms.sort().values[place])
        if limit > self.limit:
            if self.total is not None and self.limit > 0:
                # What was summed under a lower limit would have counted for more under this one.
                self.total = self.total * (limit / self.limit) ** 2
            self.limit = limit
        shares: Tensor = self.limit / norms.clamp_min(self.limit or 1.0)
        return rows * shares[:, None].to(rows.dtype)

    def mean(self) -> Tensor | None:
        """Return the moment of all positions in float64, or None where nothing was taken in.

        What lies off the diagonal of a matrix is multiplied by n / (n + d), n positions and d features: it is noise to
        about that share, and without the factor directions that n < d positions leave out would count nothing at all.
        """
        if self.total is None:
            return None
        mean = self.total / max(1, self.positions)
        if self.whole:
            diagonal = mean.diagonal().clone()
            mean *= self.positions / (self.positions + len(diagonal))
            mean.diagonal().copy_(diagonal)
        return mean


@dataclass
class _Meter:
    """What was measured at one layer."""

    inputs: Moment
    output_grads: Moment


@dataclass
class _Run:
    """What the hooks need to know of the batch that flows: its padding, and whether this is a second pass."""

    anchor: Tensor | None
    mask: Tensor | None = None
    again: bool = False


def _importances(meters: Mapping[str, _Meter]) -> dict[str, Importance]:
    grads = {name: meter.output_grads.mean() for name, meter in meters.items()}
    peaks = [float(diagonal_of(grad).amax()) for grad in grads.values() if grad is not None]
    # A constant factor has no effect, and with it float32 holds the result.
    common = max((peak for peak in peaks if 0 < peak < float("inf")), default=1.0)
    found = {}
    for name, meter in meters.items():
        grad = grads[name]
        moments = (meter.inputs.mean(), None if grad is None else grad / common)
        try:
            found[name] = Importance(*(moment if moment is None else moment.float() for moment in moments))
        except DBFError as error:
            raise error.inside(name) from error
    return found


@contextmanager
def _measuring(model: nn.Module, meters: Mapping[str, _Meter], run: _Run) -> Iterator[None]:
    """Hook the meters on the layers and switch to evaluation mode; undo both at the end, come what may."""
    modes = {module: module.training for module in model.modules()}
    layers = dense_linears(model)
    handles = [
        layers[name].register_forward_hook(_forward_hook(meter, run), with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _forward_hook(meter: _Meter, run: _Run) -> Callable[..., Tensor | None]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not run.again:
            meter.inputs.add(args[0] if args else next(iter(kwargs.values())), run.mask)
        if run.anchor is None or not torch.is_grad_enabled():
            return None
        anchored = output + run.anchor
        if not run.again:
            anchored.register_hook(partial(meter.output_grads.add, mask=run.mask))
        return anchored

    return hook


@contextmanager
def block_by_block(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device | str | None,
    run: _Run | None = None,
) -> Iterator[None]:
    """Let each block visit ``device`` for its turn, forward and backward; the rest of the model stays there."""
    if device is None:
        yield
        return
    run = run or _Run(None)
    device = with_index(device)
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    homes = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in inside]
    try:
        for tensor, _ in homes:
            tensor.data = tensor.data.to(device)
        for block in blocks:
            block.forward = _visiting(block, run, device)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for tensor, data in homes:
            tensor.data = data


def _visiting(block: nn.Module, run: _Run, device: torch.device) -> Callable[..., Any]:
    forward = block.forward

    def visit(*args: Any, **kwargs: Any) -> Any:
        calls = 0

        def compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            run.again = calls > 1
            try:
                with _copied(block, device):
                    return forward(*args, **kwargs)
            finally:
                run.again = False

        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return visit


@contextmanager
def _copied(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a block have constant copies on ``device`` of those of its tensors that are elsewhere.

    Autograd may keep the copies for the backward pass; ``tensor.data = copy`` would pull them away from under it.
    """
    copies: dict[int, Tensor] = {}
    homes: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in block.modules():
            every: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in every:
                for name, tensor in tensors.items():
                    if tensor is None or tensor.device == device:
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().to(device)
                    homes.append((tensors, name, tensor))
                    tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in homes:
            tensors[name] = tensor


def blocks_of(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Return a transformer's blocks by name: the members of the longest list of modules that holds one of ``layers``."""
    names = list(layers)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(layer.startswith(f"{name}.") for layer in names)
    }
    # A list inside of a block (the experts of one) is no list of blocks.
    outermost = {
        name: {f"{name}.{index}": block for index, block in enumerate(blocks)}
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }
    return max(outermost.values(), key=len, default={})


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def moved(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with all its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [moved(value, device) for value in batch]
    return batch


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers keep no keys and values: a block that computes twice would attend to both."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    cached = getattr(config, "use_cache", None)
    if not cached:
        yield
        return
    try:
        config.use_cache = False
        yield
    finally:
        config.use_cache = cached


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, or the sequence or mapping of its arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise ConversionError(
        f"a batch of type {type(batch).__name__}",
        "a tensor, a sequence or a mapping",
        "wrap it in one of these",
    )


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = (
            f"shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}"
            if isinstance(loss, Tensor)
            else f"type {type(loss).__name__}"
        )
        raise ConversionError(
            f"a loss of {got}",
            "a tensor with one entry that depends on the model's linear layers",
            "reduce it with mean() or sum(); do not call it under torch.no_grad() or torch.inference_mode()",
        )
    return loss
