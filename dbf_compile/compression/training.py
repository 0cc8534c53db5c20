"""Trainable factored layers, and the training loop.

    y = scale_out ⊙ (sign(latent_out) · (scale_mid ⊙ (sign(latent_in) · (scale_in ⊙ x)))) + bias

A sign has no gradient. It is the sign of a latent number, which gets the gradient of the sign (straight-through
estimator); the sign flips when its latent crosses zero. A latent starts at a distance from zero that is the confidence of
its sign: the rise of the weight's error if that sign alone were flipped, divided by the mean over its row of
``signs_out`` (column of ``signs_in``), and a twentieth of that mean at least: with whole moments there are signs whose flip alone
would gain, but not that of all of them.

Source: straight-through refinement of factors and the training loop (Adam, cosine schedule to zero, one window a step)
as in NanoQuant; latents from the cost of a flip are our own. Learning rates are relative to the root mean square of each
parameter, so that the unit of a weight does not matter.

Shape letters: K in_features, R mid_features, N out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dbf_compile.factorizer.importance import Importance
from dbf_compile.factorizer.projection import half_scales, signs_of
from dbf_compile.factorizer.refine import Product, flip_costs
from dbf_compile.factorizer.weighted import WeightedWeight
from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.machine import narrow_products
from dbf_compile.signs import pack_signs, unpack_signs
from dbf_compile.stand_in import FactoredStandIn

_SCALES = ("scale_in", "scale_mid", "scale_out")
_TINY = 1e-30
_LEAST = 0.05  # of a latent whose sign costs nothing to flip, or less: a few steps have to agree on it
_BETAS = (0.9, 0.95)
_HALVINGS = 2  # of the way from the start to the last state


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, dtype: torch.dtype) -> Tensor:
        # As signs_of, in a dtype that may be narrower.
        return torch.copysign(torch.ones((), dtype=dtype, device=latent.device), (latent + 0.0).to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].float(), None


def _product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which matrices are multiplied here: signs are made in it, once."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class Trainable(FactoredStandIn):
    """A factored layer whose scales are parameters in float32; they require no gradient until :func:`train` is called.

    Args:
        factors: the start.
        bias: [N], or None; it is not trained.
        owner: the layer whose first stage this layer shares, or None.
    """

    bias: Tensor | None
    scale_mid: nn.Parameter

    def __init__(
        self, factors: DoubleBinaryFactors, bias: Tensor | None = None, owner: Trainable | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)
        for name in _SCALES:
            self.register_parameter(name, nn.Parameter(getattr(factors, name).float(), requires_grad=False))
        if owner is not None:
            self.scale_in, self.scale_mid = owner.scale_in, owner.scale_mid

    def signs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return ``signs_in`` [R, K] and ``signs_out`` [N, R] as +1 and -1 in ``dtype``."""
        raise NotImplementedError

    @property
    def scales(self) -> list[nn.Parameter]:
        """The three scale vectors."""
        return [self.scale_in, self.scale_mid, self.scale_out]

    def product(self, x: Tensor, signs: tuple[Tensor, Tensor]) -> Tensor:
        """Return y [..., N] for x [..., K] in the dtype of x. All but the products is computed in float32."""
        inner = nn.functional.linear(x.float() * self.scale_in, signs[0]) * self.scale_mid
        y: Tensor = nn.functional.linear(inner, signs[1]) * self.scale_out
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class TrainableDoubleBinary(Trainable):
    """A factored layer whose signs and scales are parameters.

    Args:
        factors, bias, owner: as for :class:`Trainable`.
        confidence: of ``signs_in`` [R, K] and of ``signs_out`` [N, R], as from :func:`sign_confidence`.
    """

    latent_in: nn.Parameter

    def __init__(
        self,
        factors: DoubleBinaryFactors,
        confidence: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        owner: TrainableDoubleBinary | None = None,
    ) -> None:
        super().__init__(factors, bias, owner)
        # A latent of 0 would forget a sign of -1: thousands would flip before anything is learned.
        inner, outer = (each.clamp_min(_LEAST) for each in confidence)
        inner = unpack_signs(factors.signs_in, factors.in_features) * inner
        outer = unpack_signs(factors.signs_out, factors.mid_features) * outer
        self.latent_in = nn.Parameter(inner, requires_grad=False) if owner is None else owner.latent_in
        self.latent_out = nn.Parameter(outer, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., N] for x [..., K] in the dtype of x."""
        return self.product(x, self.signs(_product_dtype(x.device)))

    def signs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the signs; gradients pass through them to the latents unchanged."""
        return _Sign.apply(self.latent_in, dtype), _Sign.apply(self.latent_out, dtype)  # type: ignore[no-untyped-call]

    @property
    def latents(self) -> list[nn.Parameter]:
        """The latents of ``signs_in`` [R, K] and of ``signs_out`` [N, R]."""
        return [self.latent_in, self.latent_out]


class TrainableScales(Trainable):
    """A factored layer whose scales are parameters and whose signs stay packed; arguments as of :class:`Trainable`."""

    def __init__(
        self, factors: DoubleBinaryFactors, bias: Tensor | None = None, owner: TrainableScales | None = None
    ) -> None:
        super().__init__(factors, bias, owner)
        self._factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., N] for x [..., K] in the dtype of x."""
        with narrow_products(x.device):
            dtype = _product_dtype(x.device)
            signs = self.signs(dtype)
            places = {matrix.untyped_storage().data_ptr(): place for place, matrix in enumerate(signs)}

            # Unpacked signs take 16 or 32 times the memory: the backward pass unpacks them again.
            def pack(saved: Tensor) -> Any:
                place = places.get(saved.untyped_storage().data_ptr())
                return saved if place is None else (place, saved.size(), saved.stride())

            def unpack(packed: Any) -> Tensor:
                if isinstance(packed, Tensor):
                    return packed
                place, *layout = packed
                return self._unpacked(place, dtype).as_strided(*layout)

            with saved_tensors_hooks(pack, unpack):
                return self.product(x, signs)

    def signs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the unpacked signs."""
        return self._unpacked(0, dtype), self._unpacked(1, dtype)

    def _unpacked(self, place: int, dtype: torch.dtype) -> Tensor:
        factors = self._factors
        if place == 0:
            return unpack_signs(factors.signs_in, factors.in_features, dtype)
        return unpack_signs(factors.signs_out, factors.mid_features, dtype)


@torch.no_grad()
def sign_confidence(
    weight: Tensor, factors: DoubleBinaryFactors, importance: Importance | None
) -> tuple[Tensor, Tensor]:
    """Return the confidence of each sign: the cost of flipping it alone, over the mean cost of its row or column.

    Args:
        weight: the factored weight, floating point [N, K].
        factors: the factors of ``weight``.
        importance: the importance that it was factored with.

    Returns:
        float32, 0 or more: [R, K] for ``signs_in``, each column with mean 1, and [N, R] for ``signs_out``, each row with
        mean 1. A row or column is all zeros where no flip costs anything.
    """
    weighted = WeightedWeight.of(weight, importance)
    product = Product(
        unpack_signs(factors.signs_out, factors.mid_features),
        unpack_signs(factors.signs_in, factors.in_features),
        factors.scale_out.float() * weighted.rows,
        factors.scale_mid.float() / (weighted.unit or 1.0),
        factors.scale_in.float() * weighted.columns,
    )
    outer = flip_costs(weighted.matrix, product, weighted.column_metric)
    inner = flip_costs(weighted.matrix.T, product.transposed, weighted.row_metric)
    inner, outer = (
        costs.clamp_min(0) / costs.clamp_min(0).mean(1, keepdim=True).clamp_min(_TINY)
        for costs in (inner, outer)
    )
    return inner.T, outer


@torch.no_grad()
def trained_factors(layers: Mapping[str, Trainable]) -> dict[str, DoubleBinaryFactors]:
    """Return the factors of trained layers by name, with scales in float16; shared first stages stay shared."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.scale_in), []).append(name)
    factors: dict[str, DoubleBinaryFactors] = {}
    for names in groups.values():
        signs = [layers[name].signs() for name in names]
        first = layers[names[0]]
        scale_out = torch.cat([layers[name].scale_out for name in names])
        # Training may make scales negative; their signs go into the sign matrices.
        into, mid, out = (signs_of(scale) for scale in (first.scale_in, first.scale_mid, scale_out))
        stacked = DoubleBinaryFactors(
            pack_signs(signs[0][0] * into * mid[:, None]),
            pack_signs(torch.cat([outer for _, outer in signs]) * out[:, None]),
            *half_scales(1.0, first.scale_in.abs(), first.scale_mid.abs(), scale_out.abs()),
        )
        factors.update(zip(names, stacked.split([len(outer) for _, outer in signs]), strict=True))
    return {name: factors[name] for name in layers}


def train(
    rates: Sequence[tuple[Sequence[nn.Parameter], float]],
    loss: Callable[[int], Tensor],
    samples: int,
    epochs: int,
    generator: torch.Generator,
    progress: Callable[[], object] = lambda: None,
    judge: Callable[[], float] | None = None,
) -> int:
    """Train parameters in place with Adam, one sample a step, and return how many epochs of it are kept.

    A step changes what its sample reaches. A parameter without a gradient, or with zeros alone, keeps its value and its
    moments: an expert that no token went to, or none but padding.

    Args:
        rates: pairs of parameters and their learning rate, in units of the root mean square of each parameter. A parameter
            that occurs twice has the first rate.
        loss: index of a sample to its loss.
        samples: number of samples.
        epochs: how often each sample is used; 0 does nothing.
        generator: on the CPU; shuffles the samples in every epoch.
        progress: called after every step.
        judge: the error on samples that are not trained with. The state with the least is kept: that after an epoch, that
            before all, or one at half or a quarter of the way from that to the last. None: the last.
    """
    if not epochs:
        return 0
    groups = _groups(rates)
    parameters = [parameter for group in groups for parameter in group["params"]]
    best = None if judge is None else _Best(parameters, judge)
    # Fused, a step takes two fifths of the time.
    fused = all(group["params"][0].device.type in ("cpu", "cuda") for group in groups)
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=fused)
    steps = epochs * samples
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with torch.enable_grad():
        for epoch in range(epochs):
            for sample in torch.randperm(samples, generator=generator).tolist():
                optimizer.zero_grad()
                error = loss(sample)
                if error.requires_grad:
                    error.backward()
                    _leave_out_unreached(groups)
                optimizer.step()
                schedule.step()
                progress()
            if best is not None:
                best.look(epoch + 1)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return epochs if best is None else best.restore(epochs)


class _Best:
    """The best state of parameters on the way, by a judge; the first is that before training."""

    def __init__(self, parameters: Sequence[nn.Parameter], judge: Callable[[], float]) -> None:
        self._parameters, self._judge = parameters, judge
        self._start = [parameter.detach().clone() for parameter in parameters]
        self._error, self._values = math.inf, [value.clone() for value in self._start]
        self._epochs = 0
        self.look(0)

    @torch.no_grad()
    def look(self, epochs: int) -> None:
        """Keep the state after so many epochs if it is the best so far."""
        error = self._judge()
        if error < self._error:  # never of NaN
            self._error, self._epochs = error, epochs
            for value, parameter in zip(self._values, self._parameters, strict=True):
                value.copy_(parameter)

    @torch.no_grad()
    def restore(self, epochs: int) -> int:
        """Set the best state again, and return after how many epochs it was; ``epochs`` lead to the last.

        Steps are part gain and part noise of their samples. Along the way from the start the gain grows like the distance, the
        harm of noise like its square. So there may be a better state before one that is no better than the start.
        """
        for _ in range(_HALVINGS):
            for start, parameter in zip(self._start, self._parameters, strict=True):
                parameter.lerp_(start, 0.5)
            self.look(epochs)
        for value, parameter in zip(self._values, self._parameters, strict=True):
            parameter.copy_(value)
        return self._epochs


def _groups(rates: Sequence[tuple[Sequence[nn.Parameter], float]]) -> list[dict[str, Any]]:
    """Return groups of an optimizer, one a parameter, with rates in units of the parameter's size."""
    seen: set[int] = set()
    groups: list[dict[str, Any]] = []
    for parameters, rate in rates:
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                size = float(parameter.detach().square().mean().sqrt())
                groups.append({"params": [parameter.requires_grad_(True)], "lr": rate * size})
    return groups


def _leave_out_unreached(groups: Sequence[Mapping[str, Any]]) -> None:
    """Drop gradients of zeros alone: Adam would go on in the direction of earlier steps."""
    parameters = [
        parameter for group in groups for parameter in group["params"] if parameter.grad is not None
    ]
    norms = [torch.linalg.vector_norm(parameter.grad) for parameter in parameters]
    # One answer for all: on a GPU every question waits for it.
    sizes = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    for parameter, size in zip(parameters, sizes, strict=True):
        if size == 0:
            parameter.grad = None
